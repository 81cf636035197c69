"""Measuring what a model can do: one module per protocol, each from (model, processor, data) to a flat dict in percent."""
