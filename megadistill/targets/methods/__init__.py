"""The methods of targets, a file each. They are found by name, see targets/registered.py."""
