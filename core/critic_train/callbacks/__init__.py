"""Callbacks of a run: trackers and the report. They are given its events and cannot end it."""
