"""Trainer subclasses, callbacks and argument groups that the recipes share."""
