"""Figures, and their numbers as CSV, from the folders that runs leave behind."""
