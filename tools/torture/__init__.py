"""What tools/torture.py does to runs, files and inputs, and what must hold then."""
