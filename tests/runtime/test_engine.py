"""Graphs for every size, and none made after the build."""
