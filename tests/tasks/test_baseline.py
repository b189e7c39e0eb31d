import random

import pytest

from llmdistill.tasks.baseline import BagOfWords


def make_texts(num_texts: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of random words, some of which lean towards one of three labels."""
    generator = random.Random(seed)
    words = [f"word{index}" for index in range(30)]
    labels = [generator.choice(("red", "green", "blue")) for _ in range(num_texts)]
    leaning = {"red": words[:8], "green": words[6:14], "blue": words[12:20]}
    texts = [" ".join(generator.choices(words, k=6) + generator.choices(leaning[label], k=3)) for label in labels]
    return texts, labels


@pytest.mark.parametrize("strength", [1.0, 10.0])
def test_it_is_scikit_learns_tf_idf_and_logistic_regression(strength: float) -> None:
    text_features = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    texts, labels = make_texts(120, seed=0)
    others, _ = make_texts(80, seed=1)
    vectorizer = text_features.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    theirs = linear.LogisticRegression(C=strength, max_iter=2_000, tol=1e-8).fit(vectorizer.fit_transform(texts), labels)
    ours = BagOfWords.fit(texts, labels, inverse_regularisation=strength)
    assert list(ours.index_of_term) == list(vectorizer.get_feature_names_out())
    assert ours.labels == tuple(theirs.classes_)
    assert ours.weight.T.numpy() == pytest.approx(theirs.coef_, abs=2e-3)
    assert ours.predict(others) == list(theirs.predict(vectorizer.transform(others)))


def test_the_same_rows_give_the_same_classifier() -> None:
    texts, labels = make_texts(40, seed=2)
    assert (BagOfWords.fit(texts, labels).weight == BagOfWords.fit(texts, labels).weight).all()


def test_texts_of_unknown_words_and_no_texts_are_answered() -> None:
    texts, labels = make_texts(40, seed=3)
    bag = BagOfWords.fit(texts, labels)
    assert bag.predict(["", "nothing known"])[0] in bag.labels
    assert bag.predict([]) == []


def test_rows_that_teach_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        BagOfWords.fit(["aa", "bb"], ["x"])
    with pytest.raises(ValueError, match="0 texts"):
        BagOfWords.fit([], [])
    with pytest.raises(ValueError, match="word of two letters"):
        BagOfWords.fit(["a", "?"], ["x", "y"])
