"""What a method was told beside rank and targets makes another tuning, and stands in commands that make one alike."""

from isthmus.report.likeness import differences, placing
from tests.report.example import report, settings


def test_other_options_of_a_method_are_another_tuning() -> None:
    one, other = (report(settings=settings(peft_options=options)) for options in ((), ("num_virtual_tokens=10",)))
    assert differences(one, one) == ()
    assert differences(one, other) == ("peft options num_virtual_tokens=10 where this one had the usual",)
    assert differences(other, one) == ("peft options the usual where this one had num_virtual_tokens=10",)


def test_a_command_names_them_so_that_a_shell_takes_them() -> None:
    run = report(peft_type="trainable-tokens", settings=settings(peft_options=("token_indices=[5, 6]",)))
    assert placing(run).endswith("--peft-option 'token_indices=[5, 6]'")
    assert "--peft trainable-tokens" in placing(run)
    assert "--peft-option" not in placing(report(settings=None))
