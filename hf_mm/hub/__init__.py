"""Saving models for the Hugging Face Hub."""
