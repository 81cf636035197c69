"""Pic2Word."""
