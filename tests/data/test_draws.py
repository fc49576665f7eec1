import numpy as np

from bt.data import draws


def test_words_are_fixed_numbers():
    # A change of these would change every mask and negative of runs that are continued.
    got = draws.words(7, "mask", np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert got.tolist() == [
        [5484378911536210164, 6318257316583803140],
        [7397780008022084755, 10167144542101689477],
        [17778197801365751357, 12563171428849235043],
    ]


def test_a_draw_depends_on_its_own_pair_alone():
    ids, epochs = np.array([5, 90, 3]), np.array([2, 2, 0])
    together = draws.words(1, "x", epochs, ids, 6)
    for row in range(3):
        alone = draws.words(1, "x", epochs[row : row + 1], ids[row : row + 1], 6)
        assert np.array_equal(together[row : row + 1], alone)
    assert np.array_equal(draws.words(1, "x", epochs, ids, 2, first=4), together[:, 4:])


def test_seed_purpose_epoch_id_and_column_all_matter():
    base = draws.words(1, "x", 0, [4], 2)
    others = [draws.words(2, "x", 0, [4]), draws.words(1, "y", 0, [4]), draws.words(1, "x", 1, [4])]
    values = [int(base[0, 0]), int(base[0, 1]), *(int(o[0, 0]) for o in others), int(draws.words(1, "x", 0, [5])[0, 0])]
    assert len(set(values)) == 6


def test_uniforms_are_uniform():
    u = draws.uniforms(3, "mask", 0, np.arange(20_000), 5)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 85.4  # 49 degrees of freedom, 0.1 % point
    assert abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.03


def test_generators_differ_by_purpose_and_number():
    drawn = [draws.generator(0, p, n).integers(1 << 40) for p in ("a", "b") for n in (0, 1)]
    assert len(set(drawn)) == 4
    assert draws.generator(0, "a", 1).integers(1 << 40) == drawn[1]
