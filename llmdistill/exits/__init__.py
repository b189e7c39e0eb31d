"""Early exits: thresholds with a guarantee, from the losses of held-out rows. No torch."""
