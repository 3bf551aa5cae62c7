"""Those who look on while a run goes: trackers, the report. None of them can stop it."""
