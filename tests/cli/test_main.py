"""The program as a whole: pages, wrong command lines, what it imports, what it costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from critic_train import __version__
from critic_train_cli.main import app

ROOT = Path(__file__).parents[2]
LIGHT = {"annotated_doc", "click", "shellingham", "typer", "typing_extensions"}
"""What may be imported for a page or for an unknown flag; `python -m bench startup` measures what that takes."""
HEAVY = {"torch", "transformers", "pyarrow", "numpy", "safetensors", "matplotlib", "jinja2", "scipy", "peft", "fsspec"}
"""What may not be imported before a job starts. To read the value of a flag typer brings in pydantic."""


def words(text: str) -> list[str]:
    return text.split()


OWN_FLAGS = words("--config --print-config --json --quiet -q --debug --help -h")
FIT_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length --val-data --val-fraction
--returns --gamma --lam --lam-policy --length-alpha --truncated
--model --preset --train --lora-rank --lora-alpha
--old-values --cliprange-value --no-clip --loss-agg-mode --loss-scale-factor
--epochs --max-steps --batch-size --lr --head-lr --optimizer --weight-decay --warmup-steps --lr-schedule --grad-clip
--on-non-finite --max-skips --seed
--device --precision --packing --attention --max-tokens --activation-checkpointing --offload --compile --nproc
--out --dry-run --eval-every --best-by --patience --checkpoint-every --keep --log-every --no-report
--log-to --log-project
""")
EVAL_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length
--returns --gamma --lam --lam-policy --length-alpha --truncated
--model
--device --precision --packing --attention --max-tokens --nproc
--by --cliprange-value --resamples --seed --fail-under --fail-over
--report
""")
PREDICT_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length
--returns --gamma --lam --lam-policy --length-alpha --truncated
--model
--device --precision --packing --attention --max-tokens
--to --write --whiten-advantages --part
""")
REPORT_FLAGS = words("runs --tokenizer --to")


SPLIT_FLAGS = words("data --column --on-bad-rows --on-bad-file --max-length --val-fraction --seed --to")
CHECK_FLAGS = words("data --column --against --show")
CONVERT_FLAGS = words("""
source --from --column --on-bad-rows --on-bad-file --tokenizer --allow-retokenize
--to
""")
COMMANDS = {
    "fit": FIT_FLAGS,
    "eval": EVAL_FLAGS,
    "predict": PREDICT_FLAGS,
    "report": REPORT_FLAGS,
    "check": CHECK_FLAGS,
    "split": SPLIT_FLAGS,
    "convert": CONVERT_FLAGS,
    "verify": words("target --column"),
}


@pytest.mark.parametrize(("command", "flags"), COMMANDS.items())
def test_flags_are_these_and_no_others(command, flags):
    """The surface is frozen: a flag added, renamed or lost has to be so on purpose, here."""
    params = typer.main.get_command(app).commands[command].params
    assert [flag for param in params for flag in (*param.opts, *param.secondary_opts)] == flags + OWN_FLAGS


def test_commands_are_these():
    assert list(typer.main.get_command(app).commands) == list(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_program_page(program, flag):
    shown = program(flag)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Usage: critic-train COMMAND" in shown.stdout
    assert "fit  " in shown.stdout
    assert "eval  " in shown.stdout
    assert "70 a bug of ours" in shown.stdout


@pytest.mark.parametrize(("command", "flags"), COMMANDS.items())
def test_command_page_names_every_flag(program, command, flags):
    shown = program(command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    named = words(shown.stdout.replace(",", " "))
    assert [flag for flag in flags if flag.startswith("-") and flag not in named] == []
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_command_page_gives_choices_defaults_and_their_meaning(program):
    page = program("fit", "-h").stdout
    assert "--preset tiny|small|base" in page
    assert "[default: 64]" in page
    assert "[default: 1e-5 with --model, 1e-4 with --train lora;" in " ".join(page.split())
    assert "CRITIC_TRAIN_BATCH_SIZE is --batch-size" in page


def test_twenty_columns_are_enough_for_the_page(program):
    shown = program("fit", "--help", COLUMNS="20")
    assert shown.returncode == 0
    prose = [line for line in shown.stdout.splitlines() if not line.startswith("  ")]
    assert "Run" in prose


def test_version(program):
    shown = program("--version")
    assert (shown.returncode, shown.stdout) == (0, f"critic-train {__version__}\n")


def test_no_command_shows_the_page_and_is_wrong(program):
    shown = program()
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "Usage: critic-train COMMAND" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["fti"], "no such command 'fti'", "did you mean 'fit'?"),
        (["fit", "--epoch", "3"], "no such option: --epoch", "did you mean --epochs?"),
        (["fit", "--batch_size", "3"], "no such option: --batch_size", "did you mean --batch-size?"),
        (["fit", "--no-no-clip"], "no such option: --no-no-clip", "did you mean --no-clip?"),
        (["fit", "-x"], "no such option: -x", "critic-train fit --help lists every flag"),
        (["fit", "rollouts/"], "unexpected argument: rollouts/", "as in --data rollouts/"),
        (["fit", "--data"], "option '--data' requires an argument", "--help"),
        (["fit"], "--data is needed", "critic-train fit --help lists every flag"),
        (["eval", "--resamples", "0", "--data", "x"], "--resamples must be at least 1, not 0", "eval --help"),
        (["fit", "--data", "x", "--epochs", "two"], "--epochs must be a whole number, not 'two'", None),
        (["fit", "--data", "x", "--lr", ""], "--lr must be a number, not ''", None),
        (["fit", "--data", "x", "--preset", "smal"], "not 'smal'; did you mean small?", None),
    ],
)
def test_wrong_command_lines(program, arguments, error, hint):
    shown = program(*arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: ")
    assert error in shown.stderr.splitlines()[0]
    assert hint is None or hint in shown.stderr.splitlines()[1]
    assert "Traceback" not in shown.stderr


def test_of_several_ranks_only_rank_0_speaks(program):
    """torchrun starts every rank with the same command line; a mistake in it is told once."""
    for rank, spoken in (("0", True), ("1", False)):
        shown = program("fit", "--epochs", "0", "--data", "x", WORLD_SIZE="2", RANK=rank)
        assert (shown.returncode, shown.stdout, bool(shown.stderr)) == (2, "", spoken)
        done = program("fit", "--data", "x", WORLD_SIZE="2", RANK=rank, FAKE_JOB="finish")
        assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (0, spoken, spoken)


def test_flags_may_not_be_abbreviated(program):
    assert program("fit", "--data", "x", "--epoc", "1").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], [], ["fti"]),
        *([command, "--help"] for command in COMMANDS),
        *(["fit"], ["fit", "--epoch"], ["fit", "--no-no-clip"]),
    ],
    ids=" ".join,
)
def test_pages_and_unknown_flags_import_next_to_nothing(clean_environment, arguments):
    """So that they answer at once."""
    names = imported(clean_environment, arguments)
    assert "typer" in names
    assert names <= LIGHT | {"critic_train", "critic_train_cli"}


@pytest.mark.parametrize(
    "arguments",
    [
        *(["fit", "--epochs", "two"], ["fit", "--data", "x", "--preset", "smal"], ["fit", "rollouts/"]),
        *(["fit", "--data", "x", "--print-config"], ["fit", "--data", "x", "--config", "none.toml"]),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_a_job_starts(clean_environment, arguments):
    names = imported(clean_environment, arguments)
    assert "typer" in names
    assert not names & HEAVY


def imported(environment, arguments):
    """Third-party packages and our own that the program has imported when it ends."""
    script = (
        "import atexit, sys\n"
        "before = set(sys.modules)\n"  # what this interpreter brings in at its start, such as an editable install
        "def show():\n"
        "    names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "    print('IMPORTED', *sorted(names - set(sys.stdlib_module_names)), file=sys.stderr)\n"
        "atexit.register(show)\n"
        f"sys.path[:0] = ['core', 'cli']; sys.argv = ['critic-train', *{arguments}]\n"
        "from critic_train_cli.main import run; run()\n"
    )
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    marker, *names = shown.stderr.splitlines()[-1].split(" ")
    assert marker == "IMPORTED"
    return set(names)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("fit --pre", ["--preset", "--precision"]), ("fit --preset ", ["tiny", "small", "base"]), ("e", ["eval"])],
)
def test_completion_in_bash(fresh_program, typed, offered):
    words = f"critic-train {typed}"
    shown = fresh_program(
        _CRITIC_TRAIN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)
    )
    assert shown.stdout.split() == offered


def test_completion_script_can_be_shown(fresh_program):
    shown = fresh_program(_CRITIC_TRAIN_COMPLETE="source_bash")
    assert "_CRITIC_TRAIN_COMPLETE=complete_bash" in shown.stdout


def test_the_module_is_the_program(clean_environment):
    environment = clean_environment | {"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'cli'}"}
    command = [sys.executable, "-m", "critic_train_cli", "--version"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.startswith("critic-train ")
