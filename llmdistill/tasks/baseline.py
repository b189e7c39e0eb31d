"""A bag-of-words classifier, so that nobody is fooled about how hard a task is.

TF-IDF of words and pairs of words, and multinomial logistic regression: half the squared weights plus `inverse_regularisation` times the summed cross
entropy, minimised by L-BFGS over all rows at once. It computes what scikit-learn's TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True) and
LogisticRegression(C=...) do, in few lines over torch, so that the evaluation needs no package for its yardstick; a test holds it against scikit-learn.
A row is a sum of weights of its terms, which embedding_bag computes without a dense matrix of rows by terms. Float64, as the line search needs.

Shapes: B rows, V terms, C labels.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WORD = re.compile(r"\w\w+")


@dataclass(frozen=True, kw_only=True)
class BagOfWords:
    """A fitted classifier: the index and inverse document frequency of each term, a weight [V, C] for each term and label, a bias [C]."""

    labels: tuple[str, ...]
    index_of_term: dict[str, int]
    idf: tuple[float, ...]
    weight: Tensor
    bias: Tensor

    @staticmethod
    def fit(texts: Sequence[str], labels: Sequence[str], *, inverse_regularisation: float = 10.0, num_steps: int = 100) -> BagOfWords:
        """Train on texts and their labels; the same rows give the same classifier."""
        import torch
        from torch.nn import functional as F

        if len(texts) != len(labels) or not texts:
            raise ValueError(f"the bag of words got {len(texts)} texts and {len(labels)} labels: give as many of each, at least one")
        frequency = Counter(term for text in texts for term in set(_terms(text)))
        if not frequency:
            raise ValueError(f"none of the {len(texts)} texts has a word of two letters: there is nothing for a bag of words to learn from")
        index_of_term = {term: index for index, term in enumerate(sorted(frequency))}
        idf = tuple(math.log((1 + len(texts)) / (1 + frequency[term])) + 1 for term in index_of_term)
        names = tuple(sorted(set(labels)))
        bags = _bags(texts, index_of_term, idf)
        target_B = torch.tensor([names.index(label) for label in labels])
        weight_VC = torch.zeros(len(index_of_term), len(names), requires_grad=True, dtype=torch.float64)
        bias_C = torch.zeros(len(names), requires_grad=True, dtype=torch.float64)
        optimizer = torch.optim.LBFGS([weight_VC, bias_C], max_iter=num_steps, line_search_fn="strong_wolfe", tolerance_grad=1e-4)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = 0.5 * weight_VC.square().sum() + inverse_regularisation * F.cross_entropy(_logits(bags, weight_VC, bias_C), target_B, reduction="sum")
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return BagOfWords(labels=names, index_of_term=index_of_term, idf=idf, weight=weight_VC.detach(), bias=bias_C.detach())

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text."""
        if not texts:
            return []
        logits_BC = _logits(_bags(texts, self.index_of_term, self.idf), self.weight, self.bias)
        return [self.labels[index] for index in logits_BC.argmax(dim=1).tolist()]


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]


def _bags(texts: Sequence[str], index_of_term: dict[str, int], idf: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and weights of the terms of all texts one after the other, and where each text begins; the weights of a text have length 1."""
    import torch

    indices: list[int] = []
    weights: list[float] = []
    starts: list[int] = []
    for text in texts:
        starts.append(len(indices))
        counts = Counter(index for term in _terms(text) if (index := index_of_term.get(term)) is not None)
        raw = [(1 + math.log(count)) * idf[index] for index, count in counts.items()]
        length = math.sqrt(sum(weight * weight for weight in raw)) or 1.0
        indices.extend(counts)
        weights.extend(weight / length for weight in raw)
    return torch.tensor(indices, dtype=torch.long), torch.tensor(weights, dtype=torch.float64), torch.tensor(starts, dtype=torch.long)


def _logits(bags: tuple[Tensor, Tensor, Tensor], weight_VC: Tensor, bias_C: Tensor) -> Tensor:
    from torch.nn import functional as F

    indices, weights, starts = bags
    return F.embedding_bag(indices, weight_VC, starts, mode="sum", per_sample_weights=weights) + bias_C
