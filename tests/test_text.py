"""The language model of `swl train text`, on a tiny corpus; and the embedding."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import numpy as np
import pytest
from cases import FLOATS

import swl
from swl.cli import main
from swl.demos import text
from swl.demos.data import DataError

# ------------------------------------------------------------------------------------------------ Embedding


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (), (0,), (2, 0)], ids=str)
def test_an_embedding_looks_up_and_adds_up(backend: Any, shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((4, 3)).astype(dtype), np.asarray(rng.integers(0, 3, shape))
    dout = rng.standard_normal((*shape, 3)).astype(dtype)
    layer = swl.Embedding(backend.array(W))
    y = layer.forward(backend.array(x))
    np.testing.assert_array_equal(backend.numpy(y), W[x])
    assert layer.backward(backend.array(dout)) is None
    want = np.zeros((4, 3))
    np.add.at(want, x.reshape(-1), dout.reshape(-1, 3).astype(float))
    assert layer.dW.dtype == dtype
    tol = {2: 1e-2, 4: 1e-6, 8: 1e-14}[dtype.itemsize]
    np.testing.assert_allclose(backend.numpy(layer.dW).astype(float), want, rtol=tol, atol=tol)
    assert not backend.numpy(layer.dW)[3].astype(float).any()  # no place has that id
    assert list(layer.gradients()) == ["W"]


def test_an_embedding_refuses_what_is_no_id(backend: Any) -> None:
    layer = swl.Embedding.init(4, 3, rng=0)
    assert repr(layer) == "Embedding(4, 3)"
    with pytest.raises(TypeError, match="x must hold ids of an integer dtype, got float64"):
        layer.forward(backend.array([1.0]))
    with pytest.raises(RuntimeError, match="before forward"):
        layer.backward(backend.array(np.ones((1, 3))))
    layer.forward(backend.array([1, 2]))
    with pytest.raises(ValueError, match=r"dout must have shape \(2, 3\)"):
        layer.backward(backend.array(np.ones((2, 2))))
    with pytest.raises(ValueError, match=r"W must have shape \(D, K\)"):
        swl.Embedding(backend.array(np.ones(3)))
    if backend.is_host:
        for bad in (-1, 4):
            with pytest.raises(ValueError, match=rf"x must hold ids in \[0, 4\), got {bad}"):
                layer.forward(backend.array([0, bad]))


def test_an_embedding_in_a_network_has_the_gradient_of_the_differences(backend: Any) -> None:
    net = text.build(6, text.Settings(hidden=4, embedding=3, context=2, dtype="float64", memory_budget=200), "fused")
    x, t = backend.array(np.array([[0, 1], [1, 2], [5, 5]])), backend.array(np.array([2, 3, 0]))
    loss, dx = net.forward_backward(x, t)
    assert dx is None
    W, got = net[0].W, backend.numpy(net[0].dW)
    for place in ((5, 1), (1, 0), (4, 2)):
        losses = []
        for step in (1e-6, -1e-6):
            kept = backend.numpy(W).copy()
            moved = kept.copy()
            moved[place] += step
            W[...] = backend.array(moved)
            losses.append(float(net.forward(x, t)))
            W[...] = backend.array(kept)
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(got[place], rel=1e-5, abs=1e-9)
    assert float(loss) == pytest.approx(np.log(6), rel=0.5)


# ------------------------------------------------------------------------------------------------ the corpus


def test_a_corpus_keeps_every_tenth_text() -> None:
    found = text.corpus(f"word{i} is, here." for i in range(25))
    assert len(found.vocabulary) == 25 + len(["is", ",", "here", ".", text.END])
    assert found.vocabulary == sorted(found.vocabulary)
    assert [found.vocabulary[i] for i in found.held_out] == [
        "word9", "is", ",", "here", ".", text.END, "word19", "is", ",", "here", ".", text.END
    ]  # fmt: skip
    assert len(found.train) == 23 * 6
    limited = text.corpus((f"word{i} is, here." for i in range(25)), limit=70)
    assert len(limited.train) + len(limited.held_out) == 72
    with pytest.raises(DataError, match="at least 10 texts, got 3"):
        text.corpus("abc")


def test_the_unigram_baseline_by_hand() -> None:
    found = text.Corpus(["a", "b"], np.array([0, 0, 0]), np.array([0, 0, 1, 0]))
    assert text.unigram_perplexity(found, 2) == pytest.approx((0.2 * 0.8) ** -0.5)


def test_the_documentation_of_python_is_text_enough() -> None:
    texts = list(text.documents())
    assert texts[:300] == list(islice(text.documents(), 300))
    assert len(set(texts)) == len(texts)
    found = text.corpus(texts)
    assert len(found.vocabulary) >= 10_000
    assert "the" in found.vocabulary
    assert 8 < len(found.train) / len(found.held_out) < 13


# ------------------------------------------------------------------------------------------------ training


def tiny() -> text.Corpus:
    """Sentences whose words follow from those before them."""
    return text.corpus(
        f"the {a} sees the {b} and the {b} flees" for a in ("cat", "dog", "fox") for b in ("hen", "fly") * 9
    )


def test_both_heads_learn_the_same(backend: Any) -> None:
    words = tiny()
    settings = text.Settings(
        hidden=16, epochs=6, batch_size=64, dtype="float64", embedding=8, context=3, memory_budget=900
    )
    losses: dict[str, list[Any]] = {}
    for head in ("fused", "unfused"):
        seen = losses[head] = []
        result = text.train(words.train, words.held_out, len(words.vocabulary), settings, head, seen.append)
        assert result.peak >= result.before > 10**7
        assert result.tokens_per_second > 0
        assert result.perplexity < text.unigram_perplexity(words, 3) / 2
    fused, unfused = ([float(loss) for loss in losses[head]] for head in ("fused", "unfused"))
    np.testing.assert_allclose(fused, unfused, rtol=1e-9)
    assert fused[0] == pytest.approx(np.log(len(words.vocabulary)), rel=0.1)


def test_the_command_trains_with_both_heads_and_compares(capsys: Any) -> None:
    arguments = ["--limit", "4000", "--hidden", "8", "--embedding", "8", "--batch-size", "2048", "--backend", "numpy"]
    assert main(["train", "text", *arguments, "--epochs", "2", "--memory-budget", "500000"]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert re.match(r"backend numpy, float32; text: [\d,]+ words to train on, [\d,]+ held out, [\d,]+ distinct", out[0])
    line = r"perplexity ([\d.]+)  [\d,]+ tokens/s  peak memory (\d+) MiB, (\d+) MiB of it before the first step"
    fused, unfused = (
        re.match(name + line, got) for name, got in zip((r"fused   ", r"unfused "), (out[3], out[6]), strict=True)
    )
    for first, second in ((1, 4), (2, 5)):
        losses = [re.match(rf"epoch   {first}  loss ([\d.]+)$", out[i])[1] for i in (first, second)]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-3)
    assert fused
    assert unfused
    assert float(fused[1]) == pytest.approx(float(unfused[1]), rel=1e-2)
    assert int(fused[2]) - int(fused[3]) < int(unfused[2]) - int(unfused[3])
    last = re.match(r"test perplexity ([\d.]+), of the unigram baseline ([\d.]+)", out[-1])
    assert last
    assert float(last[1]) == pytest.approx(float(fused[1]), abs=0.1)


def test_the_command_refuses(capsys: Any) -> None:
    assert main(["train", "text", "--backend", "fortran"]) == 2
    assert "legal names are" in capsys.readouterr().err
    for wrong in (["--context", "1"], ["--epochs", "0"], ["--plot", "a.png"], ["--head", "none"]):
        with pytest.raises(SystemExit):
            main(["train", "text", *wrong])
    assert "usage: swl train text" in capsys.readouterr().err
