"""What a direction of a weight counts where all layers share one ranking. No torch, so that settings can name it; answers_loss.py computes it."""

import enum


class Importance(enum.Enum):
    """What a direction counts in the ranking over all layers."""

    ANSWERS = "what leaving it out does to what the model says on the rows, softened, whatever it should say"
    LOSS = "what leaving it out does to the loss on the rows"
    ENERGY = "its share of the energy of its layer's outputs (of its weight, where data is PLAIN)"
