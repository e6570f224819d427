"""What the experts of a trained adapter do: figures, pictures and one HTML page (tools/inspect_adapter.py)."""
