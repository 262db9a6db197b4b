"""What a model needs and can do on devices that need not be here."""
