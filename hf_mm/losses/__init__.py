"""Losses that models and trainers share."""
