"""The promises of parity, made again by the very same tests where the span runs on Ray, cut into stages or copied.

The fixtures of this folder stand in for the servers that the tests ask for.
"""

from tests.dlora import test_cores as cores
from tests.dlora import test_parity as dlora
from tests.forward_only import test_parity as forward_only
from tests.on_ray.conftest import AGAIN
from tests.parity import test_generation as generation
from tests.parity import test_training as training

test_with_cores_loss_and_every_gradient_equal_those_of_one_process = (
    cores.test_loss_and_every_cores_gradient_equal_those_of_one_process
)
test_with_ports_five_steps_of_adamw_make_the_adapter_of_plain_peft = (
    dlora.test_five_steps_of_adamw_make_the_adapter_of_plain_peft
)
test_with_ports_loss_and_every_gradient_equal_those_of_plain_peft_on_all_linear_modules = (
    dlora.test_loss_and_every_gradient_equal_those_of_plain_peft_on_all_linear_modules
)
test_with_ports_parked_adapters_are_plain_pefts_frozen_ones = dlora.test_parked_adapters_are_plain_pefts_frozen_ones
test_with_ports_what_is_parked_replaces_what_was_and_nothing_parked_adds_nothing = (
    dlora.test_what_is_parked_replaces_what_was_and_nothing_parked_adds_nothing
)
test_with_ports_where_only_some_ports_take_part_the_others_add_nothing = (
    dlora.test_where_only_some_ports_take_part_the_others_add_nothing
)
test_forward_only_five_steps_of_adamw_over_two_epochs_make_the_weights_of_one_process = (
    forward_only.test_five_steps_of_adamw_over_two_epochs_make_the_weights_of_one_process
)
test_forward_only_greedy_text_with_and_without_a_key_value_cache_is_the_whole_models = (
    forward_only.test_greedy_text_with_and_without_a_key_value_cache_is_the_whole_models
)
test_forward_only_loss_and_every_gradient_equal_those_of_one_process_before_and_after_the_outputs_are_known = (
    forward_only.test_loss_and_every_gradient_equal_those_of_one_process_before_and_after_the_outputs_are_known
)
test_a_continued_generation_takes_several_tokens_at_once = (
    generation.test_a_continued_generation_takes_several_tokens_at_once
)
test_beams_and_several_answers_are_those_of_the_whole_model = (
    generation.test_beams_and_several_answers_are_those_of_the_whole_model
)
test_greedy_generation_is_token_identical_alone_and_in_a_left_padded_batch = (
    generation.test_greedy_generation_is_token_identical_alone_and_in_a_left_padded_batch
)
test_a_lossy_codec_is_applied_to_both_passes_and_stays_within_its_error = (
    training.test_a_lossy_codec_is_applied_to_both_passes_and_stays_within_its_error
)
test_five_steps_of_adamw_make_the_adapter_of_one_process = (
    training.test_five_steps_of_adamw_make_the_adapter_of_one_process
)
test_logits_at_real_positions_equal_the_whole_models_however_a_batch_is_padded = (
    training.test_logits_at_real_positions_equal_the_whole_models_however_a_batch_is_padded
)
test_loss_and_every_gradient_equal_those_of_one_process = (
    training.test_loss_and_every_gradient_equal_those_of_one_process
)


def test_what_is_run_again_is_among_what_the_suites_run() -> None:
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    for name, values in AGAIN.items():
        known = [value for mark in marks if mark.args[0] == name for value in mark.args[1]]
        assert all(value in known for value in values), name
