"""Methods side by side on one model: one calibration text, one evaluation, one file of results."""
