"""What `make quick` runs: the tests that need no model, no process and no compiler; and what holds them to it."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FILES = (
    "boots", "catalog", "codec", "cold_start_bench", "deadline", "dialects", "disks", "errors", "fetch", "floors",
    "forms", "golden", "hub", "lane", "lowered", "metrics", "modal_app", "needed", "optimize", "outcomes", "painter",
    "pairs", "photos", "pieces", "prices", "properties", "publishing", "queue", "receipts", "repeats", "request",
    "recipes", "room", "scenes", "embedded", "durations", "remedies",
    "settings", "spend", "stages", "stopping", "untrusted", "volume", "weights",
)  # fmt: skip
HEAVY = ("spark", "server", "compiler", "boot")  # fixtures
BESIDES = (  # tests of these files that need more
    "test_a_crash_is_told", "test_a_real_model_draws_and_its_memory_is_given_back", "test_what_streams_in_each_mode",
    "test_a_forked_process_has_threads_of_its_own",
    "test_a_killed_fetch_leaves_no_model_and_the_next_completes_it",
    "test_a_package_that_cannot_be_bound_is_made_again",
    "test_a_package_that_was_read_wrong_once_stays", "test_the_check_up_reads_a_package_as_a_start_would",
    "test_a_package_that_is_found_and_does_not_work_is_made_again", "test_a_real_server_logs_no_prompt",
    "test_a_terminal_sees_progress", "test_a_worker_boots_from_its_receipt",
    "test_a_worker_boots_on_what_was_fetched", "test_bake_makes_a_package_again_that_does_not_work",
    "test_baked_weights_that_are_damaged_are_made_again", "test_keys_are_never_shown",
    "test_past_the_limit_its_children_die_too", "test_processes_that_publish_at_once_leave_one_whole_folder",
    "test_reading_needs_no_torch", "test_the_command_brings_exactly_what_is_needed",
    "test_two_at_once_end_with_one_good_copy", "test_a_real_sweep", "test_a_server_starts_draws_and_ends",
    "test_the_nearest_package_is_not_blamed_for_ones_own", "test_what_its_head_tells_to_set_holds",
    "test_a_picture_that_has_no_room_is_a_line_and_no_traceback", "test_importing_handler_imports_nothing_heavy",
    "test_nor_to_measure_or_compile_for_it",
    "test_deploying_needs_no_torch_and_no_web_server", "test_what_is_done_before_a_snapshot_asks_nothing_about_gpus",
    "test_a_heic_as_telephones_take_it_is_read", "test_a_heic_that_says_it_is_huge_is_not_decoded",
    "test_a_part_of_a_heic_is_none", "test_colours_come_as_srgb_whatever_profile_they_have",
    "test_a_trial_gets_no_secrets_and_a_receipt_nothing_that_it_said", "test_two_at_once_where_nothing_can_be_locked",
    "test_a_start_with_all_imports_has_them",
    "test_what_came_to_a_fetch_that_was_killed_goes_and_what_comes_to_others_stays",
    "test_a_worker_that_may_not_write_says_so_once_at_its_start_and_serves",
    "test_commands_tell_the_remedy_of_a_volume_that_is_anothers", "test_a_server_starts_without_what_only_graphs_need",
)  # fmt: skip
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")  # audit events of a new process
_hearing = _running = False


def quick(item: Any) -> bool:
    """Whether a test is one of them."""
    return (
        item.path.stem.removeprefix("test_") in FILES
        and item.originalname not in BESIDES
        and not {*HEAVY} & {*item.fixturenames}
    )


@contextmanager
def held() -> Iterator[None]:
    """While this lasts, who starts a process or loads a model fails."""
    global _hearing, _running
    if not _hearing:
        sys.addaudithook(_hear)  # for good: it cannot be taken off
    families: Any = importlib.import_module("handler.model.families")  # late, for who only hands out tests
    _hearing, _running, build = True, True, families.build
    families.build = _refuse
    try:
        yield
    finally:
        _running, families.build = False, build


def _refuse(*_: Any) -> Any:
    raise RuntimeError("a test of `make quick` loads a model: tests/quick.py has to name it")


def _hear(event: str, _: Any) -> None:
    if _running and event in STARTS:
        raise RuntimeError("a test of `make quick` starts a process: tests/quick.py has to name it")
