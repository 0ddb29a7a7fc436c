from posttrain.registry import Registry


def test_looks_count_up_per_suite_and_outlive_the_connection(registry, tmp_path):
    assert registry.record_look(["s1"], "c1", "b") == 1
    assert registry.record_look(["s1"], "c2", "b") == 2
    assert registry.record_look(["s2"], "c2", "b") == 1
    again = Registry(tmp_path / "registry")
    assert again.record_look(["s1"], "c3", "b") == 3
    assert (again.count_looks("s1"), again.count_looks("s2"), again.count_looks("s3")) == (3, 1, 0)
    again.close()


def test_judging_the_same_pair_again_is_not_another_look(registry):
    assert registry.record_look(["s1"], "c1", "b") == 1
    assert registry.record_look(["s1"], "c2", "b") == 2
    assert registry.record_look(["s1"], "c1", "b") == 1
    assert registry.record_look(["s1"], "c1", "other baseline") == 3


def test_the_most_looked_at_suite_counts(registry):
    registry.record_look(["s1"], "c1", "b")
    assert registry.record_look(["s1", "s2"], "c2", "b") == 2
