"""The numeric core of the likelihood estimates, against ArviZ, closed forms and brute force."""

import importlib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mmzoo.evaluation.pareto import WeightSummary, pareto_k, tail_size


def arviz_pareto_k() -> Callable[[np.ndarray], np.ndarray]:
    """ArviZ's own k-hat of positive log weights (N, K), whichever generation is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stats = importlib.import_module("arviz_stats.base").array_stats
        except ImportError:
            arviz = pytest.importorskip("arviz")
            return lambda log_w: arviz.psislw(log_w.copy())[1]
    return lambda log_w: np.array([stats.psislw(-row)[1] for row in log_w])


def summarise(log_w: Tensor, chunk: int, **options: Tensor | int) -> dict[str, Tensor]:
    """Summary of weights (K, N) that come in chunks of draws."""
    log_coef, stratum = options.get("log_coef"), options.get("stratum")
    summary = WeightSummary(log_w.shape[0], num_strata=options.get("num_strata", 1))
    for start in range(0, log_w.shape[0], chunk):
        rows = slice(start, start + chunk)
        summary.update(
            log_w[rows],
            None if log_coef is None else log_coef[rows],
            None if stratum is None else stratum[rows],
        )
    return summary.result()


# arviz-stats rounds the size of the tail down where the older ArviZ, as R's loo, rounds it up, and
# does not fit a tail of five: 25, 101 and 1000 draws are for the older one alone.
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("num_draws", [30, 100, 900, 25, 101, 1000])
def test_pareto_k_equals_arviz_for_both_signs(num_draws: int, scale: float) -> None:
    if num_draws in (25, 101, 1000) and importlib.util.find_spec("arviz_stats"):
        pytest.skip("arviz-stats has another size of the tail")
    log_w = np.random.default_rng(num_draws).standard_t(5, size=(num_draws, 40)) * scale - 90
    reference = arviz_pareto_k()
    for signed in (log_w, -log_w):
        expected = reference(signed.T)
        assert isinstance(pareto_k(signed), np.ndarray)
        np.testing.assert_allclose(pareto_k(signed), expected, rtol=0, atol=1e-9)


def test_heavy_tailed_weights_have_the_large_k() -> None:
    log_w = torch.distributions.Exponential(1.0).sample((2000, 50)) * 1.5  # w is Pareto, k = 1.5
    assert (pareto_k(log_w) > 1).all()
    assert (pareto_k(-log_w) < 0.5).all()


@pytest.mark.parametrize("shape", [-0.3, 0.3, 0.7, 1.2])
def test_known_shape_is_recovered(shape: float) -> None:
    uniform = torch.rand(20_000, 200)
    weights = torch.expm1(-shape * torch.log1p(-uniform)) / shape  # generalised Pareto draws
    k = pareto_k(weights.log())
    n = tail_size(20_000)
    shrunk = (n * shape + 5) / (n + 10)  # what the prior leaves of the truth
    assert (k.mean() - shrunk).abs() < 5 * k.std() / 200**0.5
    # The asymptotic deviation of an efficient estimate is (1 + k) / sqrt(n).
    efficient = max(1 + shape, 0.5) / n**0.5
    assert k.std() < efficient * (1 + 5 / 400**0.5)


def test_chunks_do_not_change_the_summary() -> None:
    log_w = torch.randn(500, 30) * 2 - 700
    stratum = torch.randint(3, (500, 30))
    log_coef = torch.rand(500, 30).log() - 6
    for options in ({}, {"log_coef": log_coef, "stratum": stratum, "num_strata": 3}):
        whole = summarise(log_w, 500, **options)
        for chunk in (1, 7, 160):
            for name, value in summarise(log_w, chunk, **options).items():
                torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)


def test_estimate_and_sample_size_equal_their_definitions() -> None:
    log_w = torch.randn(300, 20)
    result = summarise(log_w, 64)
    w = log_w.exp()
    expected = {
        "log_prob": w.mean(0).log(),
        "mcse": w.std(0) / w.mean(0) / 300**0.5,
        "ess": w.sum(0) ** 2 / w.square().sum(0),
        "pareto_k": pareto_k(log_w),
    }
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-11, atol=1e-11)


def test_stratified_variance_equals_the_brute_formula() -> None:
    counts, shares = [60, 100, 140], [0.5, 0.3, 0.2]
    stratum = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    stratum = stratum[torch.randperm(300)][:, None].expand(300, 10)
    log_w = torch.randn(300, 10) + 3.0 * stratum  # the strata differ in their means
    coef = torch.tensor([s / n for s, n in zip(shares, counts, strict=True)])[stratum]
    result = summarise(log_w, 37, log_coef=coef.log(), stratum=stratum, num_strata=3)
    w = log_w.exp()
    estimate = (coef * w).sum(0)
    variance = torch.zeros(10)
    for c in range(3):
        inside = torch.stack([w[stratum[:, i] == c, i] for i in range(10)], 1)  # (n_c, N)
        variance += shares[c] ** 2 * inside.var(0) / counts[c]
    torch.testing.assert_close(result["log_prob"], estimate.log(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result["mcse"], variance.sqrt() / estimate, rtol=1e-11, atol=0)
    pooled = summarise(log_w, 37, log_coef=coef.log())
    assert (result["mcse"] < pooled["mcse"]).all()  # strata remove the variance between them


def test_draws_without_a_coefficient_do_not_count() -> None:
    """A row whose second component is absent equals the row of its first component alone."""
    log_w = torch.randn(400, 5)
    stratum = (torch.arange(400) % 2)[:, None]
    log_coef = torch.where(stratum == 0, -math.log(200), -math.inf)
    hidden = log_w.clone()
    hidden[1::2] = math.nan
    result = summarise(hidden, 50, log_coef=log_coef, stratum=stratum, num_strata=2)
    for name, value in summarise(log_w[::2], 50).items():
        torch.testing.assert_close(result[name], value, rtol=1e-11, atol=1e-11)


def test_standard_error_covers_the_truth_at_its_rate() -> None:
    scale, rows = 0.5, 4000
    result = summarise(torch.randn(1000, rows) * scale, 250)
    z = (result["log_prob"] - scale**2 / 2) / result["mcse"]
    share = (z.abs() < 1.96).double().mean()
    assert (share - 0.95).abs() < 5 * (0.95 * 0.05 / rows) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_weights_are_exact(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    log_w = -123.4 * (1 + eps * torch.randint(-2, 3, (300, 8)).double())
    result = summarise(log_w.to(dtype), 100)
    assert (result["pareto_k"] == -math.inf).all()
    assert (result["mcse"] <= 4 * 123.4 * eps / 300**0.5).all()
    torch.testing.assert_close(result["ess"], torch.full((8,), 300.0), rtol=1e-7, atol=0)
    torch.testing.assert_close(result["log_prob"], log_w.mean(0), rtol=2 * eps, atol=0)
    exact = summarise(torch.full((300, 1), -2.5, dtype=dtype), 70)
    assert exact["mcse"].item() <= torch.finfo(torch.float64).eps


@pytest.mark.parametrize("size", [1e4, 1e6, 3e6])
def test_large_uneven_weights_are_not_taken_for_constant(size: float) -> None:
    """In float32 a millionth of log w is some nats: that is no round-off."""
    noise = 4 * torch.randn(1000, 8)
    rounded = (noise.float() - size).float()
    k = summarise(rounded, 100)["pareto_k"]
    expected = summarise(rounded.double() + size, 100)["pareto_k"]  # the same, without the size
    assert (expected > 0.5).all()
    torch.testing.assert_close(k, expected, rtol=0, atol=1e-6)


def test_too_few_draws_have_no_shape() -> None:
    assert pareto_k(torch.randn(20, 3)).isnan().all()
    assert pareto_k(torch.randn(21, 3)).isfinite().all()
    alone = torch.zeros(100, 1)
    alone[:3] = 9.0  # ties at the threshold leave a tail of three
    assert pareto_k(alone).isnan().all()
    assert summarise(torch.randn(1, 3), 1)["mcse"].isnan().all()


def test_zero_weights() -> None:
    log_w = torch.randn(200, 2)
    log_w[:, 0] = -math.inf
    log_w[:150, 1] = -math.inf
    result = summarise(log_w, 40)
    assert result["log_prob"][0] == -math.inf
    assert result["mcse"][0].isnan()
    assert result["pareto_k"][0].isnan()
    w = log_w[:, 1].exp()
    torch.testing.assert_close(result["mcse"][1], w.std() / w.mean() / 200**0.5)
    np.testing.assert_allclose(result["pareto_k"][1], arviz_pareto_k()(log_w[:, 1:].numpy().T))


def test_nan_weights_stay_nan() -> None:
    log_w = torch.randn(200, 2)
    log_w[17, 0] = math.nan
    result = summarise(log_w, 50)
    for value in result.values():
        assert value.isnan().tolist() == [True, False]


def test_float32_accumulates_in_float64() -> None:
    log_w = (torch.randn(50_000, 2) * 0.1).float()
    result = summarise(log_w, 10)
    exact = log_w.double().exp().mean(0).log()
    assert result["log_prob"].dtype == torch.float64
    torch.testing.assert_close(result["log_prob"], exact, rtol=0, atol=1e-13)


def test_memory_is_flat_and_time_is_short() -> None:
    """What is kept grows like the tail, 3 sqrt(K), and a table's worth of rows takes no time."""
    summary = WeightSummary(1000)
    log_w = torch.randn(50, 10_000, dtype=torch.float32)
    start = time.process_time()
    for _ in range(20):
        summary.update(log_w)
    kept = sum(part.shape[1] for part in summary._tail)
    result = summary.result()
    assert time.process_time() - start < 10  # 0.4 s on two idle cores
    assert kept <= 3 * (tail_size(1000) + 1) + 50
    assert result["pareto_k"].shape == (10_000,)


def test_arrays_of_any_batch_shape() -> None:
    log_w = torch.randn(300, 2, 3)
    k = pareto_k(log_w)
    assert k.shape == (2, 3)
    torch.testing.assert_close(k[1, 2], pareto_k(log_w[:, 1, 2]))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(K, \*batch\) with at least one draw"):
        pareto_k(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="expected num_draws and num_strata of at least 1"):
        WeightSummary(0)
    summary = WeightSummary(10, num_strata=2)
    with pytest.raises(ValueError, match=r"log_w: expected shape \(k, N\), found \(4,\)"):
        summary.update(torch.zeros(4))
    with pytest.raises(ValueError, match="stratum: expected indices of 2 strata, found none"):
        summary.update(torch.zeros(4, 3))
    summary.update(torch.zeros(4, 3), None, torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected shape \(k, 3\), found \(4, 2\)"):
        summary.update(torch.zeros(4, 2), None, torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="expected 10 draws in all, found 11; raise num_draws"):
        summary.update(torch.zeros(7, 3), None, torch.zeros(7, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="expected 10 draws, found 4"):
        summary.result()


def test_summary_that_goes_on_with_some_rows_is_that_of_those_rows() -> None:
    log_w = torch.randn(600, 5, generator=torch.Generator().manual_seed(0)).mul(2)
    kept = torch.tensor([True, False, True, True, False])
    stratum = torch.arange(600).remainder(2).unsqueeze(-1)
    coef = torch.full((600, 1), -math.log(600.0))
    whole = WeightSummary(600, num_strata=2)
    whole.update(log_w[:, kept], coef, stratum)
    summary = WeightSummary(600, num_strata=2)
    for start in range(0, 200, 50):
        part = slice(start, start + 50)
        summary.update(log_w[part], coef[part], stratum[part])
    early = summary.result(partial=True)
    summary.keep(kept)
    for start in range(200, 600, 100):
        part = slice(start, start + 100)
        summary.update(log_w[part][:, kept], coef[part], stratum[part])
    for kind, values in summary.result().items():
        torch.testing.assert_close(values, whole.result()[kind], rtol=1e-10, atol=0)
    # Before all draws have come the sum is one of 200; everything else is as it would be of 200.
    first = WeightSummary(200, num_strata=2)
    first.update(log_w[:200], coef[:200] + math.log(3.0), stratum[:200])
    for kind, values in first.result().items():
        expected = values - math.log(3.0) if kind == "log_prob" else values
        torch.testing.assert_close(early[kind], expected, rtol=1e-10, atol=1e-12)


def test_nothing_is_said_before_the_first_draw() -> None:
    with pytest.raises(ValueError, match="expected 3 draws, found 0"):
        WeightSummary(3).result(partial=True)
