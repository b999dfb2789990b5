"""An owner is told when a gap protects nothing, and what would make it larger of what was in fact used."""

from typing import Any

import pytest

from emulator.gap import check_gap, figures, warning
from isthmus.emulated.recipe import Distance, Distillation, Emulator, Recipe
from isthmus.errors import ModelError

HASH = "0" * 64
ALL: tuple[int | None, ...] = (1, 2, 3, 4)


def distance(gap: float, interval: tuple[float, float] | None, rows: int = 30) -> Distance:
    losses = {"loss": 3.0 + gap, "loss_of_span": 3.0}
    return Distance(text=HASH, rows=rows, tokens=900, hidden=0.1, gap=gap, gap_interval=interval, **losses)


@pytest.mark.parametrize(
    ("gap", "interval", "said"),
    [
        (0.3, (0.2, 0.4), None),
        (-0.0261, (-0.0382, -0.0139), "nothing is protected: on this text the model is better with the emulator"),
        (0.01, (-0.02, 0.04), "nothing is protected, as far as these rows tell: the interval of the gap includes 0"),
        (-0.01, (-0.04, 0.02), "nothing is protected, as far as these rows tell"),
        (0.0, (0.0, 0.0), "nothing is protected, as far as these rows tell"),
        (2e-5, (1e-5, 3e-5), "nothing is protected, as far as these rows tell"),
        (0.3, None, "not known: a single row has no interval"),
    ],
)
def test_a_gap_that_protects_nothing_for_sure_gets_a_sentence(
    gap: float, interval: tuple[float, float] | None, said: str | None
) -> None:
    found = warning(distance(gap, interval))
    assert found is None if said is None else str(found).startswith(said)


def test_nothing_is_ever_minus_zero() -> None:
    assert figures(distance(-2e-5, (-3e-5, -1e-5))) == "+0.0000 nats per token (95 % +0.0000 to +0.0000)"
    assert figures(distance(-0.0261, (-0.0382, 0.0139))) == "-0.0261 nats per token (95 % -0.0382 to +0.0139)"
    assert figures(distance(0.5, None)) == "+0.5000 nats per token"


def about(measured: Distance, distilled: bool = False, **recipe: Any) -> Emulator:
    told = Distillation(text=HASH, steps=1, batch_size=1, lr=1e-3, seed=0, before=measured, curve=())
    counts = ("parameters", "span_parameters", "weight_bytes", "flops_per_token", "span_flops_per_token")
    return Emulator(
        recipe=Recipe(cut="1:1", **{"blocks": ALL, **recipe}),
        distance=measured,
        distillation=told if distilled else None,
        **dict.fromkeys(counts, 1),
    )


NEAR, UNSURE = distance(0.1, (0.05, 0.15)), distance(0.6, (0.3, 0.9))


@pytest.mark.parametrize(
    ("emulator", "remedy"),
    [
        (about(NEAR, method="quant", bits=8), "give fewer --bits"),
        (about(NEAR, method="quant", bits=4), "give another --method, for there are no fewer --bits"),
        (about(NEAR, method="rank", bits=4), "give a lower --keep"),
        (about(NEAR, method="drop"), "give a lower --keep"),
        (about(NEAR, method="drop", blocks=(None, 2, None, None)), "give another --method, for"),
        (about(NEAR, True, method="drop"), "give a lower --keep or fewer --steps of distillation"),
        (about(UNSURE, method="drop"), "give a lower --keep or more --text, which narrows the interval"),
        (about(distance(0.6, (0.3, 0.9), rows=64), method="drop"), "give a lower --keep"),
    ],
)
def test_a_refusal_names_only_what_would_help_this_emulator(emulator: Emulator, remedy: str) -> None:
    with pytest.raises(ModelError, match=r"asks for 0\.5 at its lower limit") as caught:
        check_gap(emulator, 0.5, "; kept")
    assert str(caught.value).split("; ")[1].startswith(remedy)
    if "another" not in remedy:
        assert str(caught.value).endswith(f"{remedy}; kept")


def test_a_gap_that_is_large_enough_or_not_asked_about_passes() -> None:
    check_gap(about(UNSURE, method="drop"), 0.3, "")
    check_gap(about(NEAR, method="drop"), None, "")
