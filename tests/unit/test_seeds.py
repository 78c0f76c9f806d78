"""Seeds of the sampling: the same for the same completion, another for any other."""

from maspo_ray.rollouts.seeds import sampling_seeds


def test_seeds_depend_on_run_prompt_times_drawn_and_sample_and_on_nothing_else() -> None:
    assert sampling_seeds(0, "a/1", 0, 4) == sampling_seeds(0, "a/1", 0, 8)[:4]
    others = [sampling_seeds(*key, 4) for key in ((0, "a/1", 0), (1, "a/1", 0), (0, "a/2", 0), (0, "a/1", 1))]
    drawn = [seed for seeds in others for seed in seeds]
    assert len(set(drawn)) == 16
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_seeds_are_the_same_in_every_process() -> None:
    # Python's own `hash` of a string is not; these were computed once.
    assert sampling_seeds(0, "data/0", 0, 2) == [6633868964923633427, 2159275716782566964]
