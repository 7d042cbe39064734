"""Inputs: files and folders, the records in them, and the publishers' formats."""
