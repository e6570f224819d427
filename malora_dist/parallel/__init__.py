"""Devices, process groups and collectives: everything that knows there is more than one process."""
