"""Bundles: the manifest, the folder, and the checks of graphs that anybody may have written."""
