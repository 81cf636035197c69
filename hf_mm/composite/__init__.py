"""What every model with frozen parts shares."""
