"""A model in another form, and the gate that says whether it is still the same model. `export_model` writes nothing unproven."""
