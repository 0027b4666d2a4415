"""The noise of sampling: independent Gumbel numbers, whichever coordinate of the counter changes."""

import numpy as np
import pytest
import torch
from scipy import stats

from summarize_from_feedback_details.common.noise import episode_keys, gumbel_noise

V = 2048


def table(seeds=(1,), episodes=(0,), positions=(0,), V=V) -> np.ndarray:
    """[seeds, episodes, positions, V]"""
    keys = [episode_keys(seed, episodes, "cpu") for seed in seeds]
    noise = [torch.stack([gumbel_noise(key, t, V) for t in positions], dim=1) for key in keys]
    return torch.stack(noise).numpy()


def uniform(noise: np.ndarray) -> np.ndarray:
    """Uniform on (0, 1): small where the noise is large."""
    return -np.expm1(-np.exp(-noise.astype(np.float64)))


# one coordinate in consecutive numbers, as training has them: by rows, by positions, by seeds, by ids
ALONG = {
    "ids": table(V=2**21).reshape(1, -1),
    "episodes": table(episodes=range(1024))[0, :, 0],
    "positions": table(positions=range(1024))[0, 0],
    "seeds": table(seeds=range(1024))[:, 0, 0],
    "samples of a query": table(episodes=range(0, 1024 * 10**7, 10**7))[0, :, 0],  # best_of_n.APART
}


@pytest.mark.parametrize("along", ALONG)
def test_gumbel_numbers(along):
    """Uniform in 4,096 cells and in their finest digits (chi-square), of Gumbel's distribution, with its moments."""
    noise = ALONG[along]
    u, n = uniform(noise).ravel(), noise.size
    assert u.min() > 0 and u.max() < 1
    for digits in (u, u * 2**12 % 1, (1 - u) * 2**12 % 1):
        counts = np.histogram(digits, bins=4096, range=(0, 1))[0]
        assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.kstest(noise.ravel()[:: n // 100_000], "gumbel_r").pvalue > 1e-4
    assert abs(noise.mean() - np.euler_gamma) < 4.5 * np.pi / np.sqrt(6 * n)
    assert abs(noise.var() - np.pi**2 / 6) < 4.5 * np.sqrt(4.4 / n) * np.pi**2 / 6  # kurtosis 5.4


@pytest.mark.parametrize("along", [name for name in ALONG if name != "ids"])
def test_neighbours_are_independent(along):
    """Of a row, of a column, of a diagonal: no correlation, and all pairs of cells are equally frequent."""
    u = uniform(ALONG[along])
    for down, right in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (64, 0), (512, 0), (0, 256), (1, 1024)):
        a = u[: len(u) - down, : V - right].ravel()
        b = u[down:, right:].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(a)), (down, right)
        for fine in (1, 2**10):  # leading digits and finer ones
            cells = np.histogram2d(a * fine % 1, b * fine % 1, bins=32, range=((0, 1), (0, 1)))[0]
            assert stats.chisquare(cells.ravel()).pvalue > 1e-5, (down, right, fine)


@pytest.mark.parametrize("along", [name for name in ALONG if name != "ids"])
def test_no_two_rows_alike(along):
    """Of all 1,024: neither correlated nor shifted against each other."""
    noise = uniform(ALONG[along]) - 0.5
    correlation = np.corrcoef(noise)
    assert np.abs(correlation[~np.eye(len(noise), dtype=bool)]).max() < 6.5 / np.sqrt(V)
    spectrum = np.fft.rfft(noise[:64])
    shifted = np.fft.irfft(spectrum[:, None] * spectrum[None].conj(), n=V) / (V / 12)  # [64, 64, shift]
    shifted[np.arange(64), np.arange(64), 0] = 0
    assert np.abs(shifted).max() < 6.5 / np.sqrt(V)
    # the winners of rows, which are what sampling keeps, are as often the same as chance has it
    winners = noise.argmin(1)
    assert stats.chisquare(np.histogram(winners, bins=32, range=(0, V))[0]).pvalue > 1e-4
    same = (winners[:, None] == winners[None])[np.triu_indices(len(winners), 1)].sum()
    assert stats.poisson(len(winners) * (len(winners) - 1) / 2 / V).sf(same - 1) > 1e-4


def test_tails():
    """Of 134 million numbers: as many beyond each bound as the distribution has, the largest among them."""
    keys = episode_keys(3, range(128), "cpu")
    beyond, lowest, highest = np.zeros(10), 0.0, 0.0
    for position in range(4):
        noise = gumbel_noise(keys, position, 2**18)
        beyond += [int((noise > bound).sum()) for bound in range(6, 16)]
        lowest, highest = min(lowest, float(noise.min())), max(highest, float(noise.max()))
    n = 4 * 128 * 2**18
    for bound, count in zip(range(6, 16), beyond):
        expected = stats.poisson(n * stats.gumbel_r.sf(bound))
        assert 1e-5 < expected.cdf(count) < 1 - 1e-5, f"{count} beyond {bound}, expected {expected.mean():.1f}"
    assert np.log(n) - 2.5 < highest < np.log(n) + 12 and np.isfinite(lowest) and lowest < -2.7


def test_no_key_occurs_twice():
    keys = torch.stack([episode_keys(seed, range(1000), "cpu") for seed in range(1000)])
    assert keys.unique().numel() == 10**6


def test_the_same_for_any_batch_and_width():
    whole = table(episodes=range(7), positions=(5,))[0, :, 0]
    for i in range(7):
        np.testing.assert_array_equal(table(episodes=[i], positions=(5,), V=33)[0, 0, 0], whole[i, :33])
    found = gumbel_noise(episode_keys(2**40, [3, 10**12], "cpu"), 52, 50304)
    assert found.shape == (2, 50304) and found.dtype == torch.float32


def test_numbers_stay_what_they_are():
    """Runs of another version draw the same tokens: by plain integers of Python, for seeds and episodes of any size."""
    golden, limit = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix64(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & limit
        x = (x ^ x >> 27) * 0x94D049BB133111EB & limit
        return x ^ x >> 31

    def word(seed, episode, position, token):
        key = mix64((seed + 1) * golden & limit)
        key = mix64((episode + 1) * golden + key & limit)
        key = mix64(key + (position + 1) * golden & limit)
        x = token * 0x9E3779B1 + key & 2**32 - 1
        x = (x ^ x >> 16) * 0x7FEB352D + (key >> 32) & 2**32 - 1
        x = (x ^ x >> 15) * 0x846CA68B & 2**32 - 1
        return (x ^ x >> 16) & 2**31 - 1

    for seed in (0, 1, 2**31, 2**63, 2**70):
        for episode in (0, 5, 63 * 10**7 + 1, 2**40):
            noise = gumbel_noise(episode_keys(seed, [episode], "cpu"), 7, 300)[0].double()
            words = np.array([word(seed, episode, 7, token) for token in range(300)])
            expected = -np.log(-np.log1p(-(words + 0.5) / 2**31))
            np.testing.assert_allclose(noise, expected, rtol=0, atol=1e-3)  # float32 is coarse where they lose
    assert mix64(golden) == 0xE220A8397B1DCDAF  # SplitMix64's first number from seed 0, as published
