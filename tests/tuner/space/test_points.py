""""""

from tuner.space.points import candidates, knobs_of, precisions_of, searched_by_default


def test_candidates_are_the_product_in_a_stable_order():
    points = candidates(16, 2, ("bf16", "fp32"), (True, False))

    assert len(points) == len(set(points)) == 4 * 2 * 2
    assert points == candidates(16, 2, ["fp32", "bf16", "bf16"], [False, True])
    assert [str(p) for p in points[:5]] == ["1x8 fp32", "2x4 fp32", "4x2 fp32", "8x1 fp32", "1x8 fp32 ckpt"]


def test_candidates_keep_only_the_batches_asked_for():
    points = candidates(48, 2, ["bf16"], [False], per_device=[6, 5, 4])
    assert [str(p) for p in points] == ["4x6 bf16", "6x4 bf16"]


def test_knobs_multiply_the_candidates():
    knobs = {"attn_implementation": ["sdpa", "eager"], "torch_compile": [True]}
    points = candidates(4, 2, ["bf16"], [False], knobs=knobs)
    assert [str(p) for p in points] == [
        "1x2 bf16 attn_implementation=sdpa torch_compile=True",
        "2x1 bf16 attn_implementation=sdpa torch_compile=True",
        "1x2 bf16 attn_implementation=eager torch_compile=True",
        "2x1 bf16 attn_implementation=eager torch_compile=True",
    ]
    assert knobs_of(points) == knobs
    assert knobs_of(candidates(4, 2, ["bf16"], [False])) == {}


def test_precisions_follow_the_device():
    assert precisions_of("cpu", None) == ("fp32", "bf16")
    assert precisions_of("cuda", (7, 5)) == ("fp32", "fp16")
    assert set(precisions_of("cuda", (8, 0))) == {"fp32", "tf32", "bf16", "fp16", "nf4"}
    assert precisions_of("cuda", (12, 0)) == precisions_of("cuda", (8, 9))


def test_what_changes_the_base_is_searched_on_request_only():
    assert searched_by_default(precisions_of("cuda", (9, 0))) == ("fp32", "tf32", "bf16", "fp16")
    assert searched_by_default(precisions_of("cpu", None)) == ("fp32", "bf16")
