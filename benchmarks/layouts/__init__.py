"""The parts of layout_study.py: which layouts, how they are timed, the document."""
