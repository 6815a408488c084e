"""Sizes of the windows in which pages are looked at."""

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
