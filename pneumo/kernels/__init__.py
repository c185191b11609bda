"""What data and decision compute with alike: runs. Imports nothing from pneumo."""
