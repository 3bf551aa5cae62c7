"""A command's options: those that are declared and no others, on its page, spelt out, completed."""

import pytest
import typer.main

from critic_train_cli.main import app


def words(text: str) -> list[str]:
    return text.split()


OWN_FLAGS = words("--config --print-config --json --quiet -q --debug --help -h")
FIT_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length --group-by --val-data --val-fraction
--returns --gamma --lam --lam-policy --length-alpha --truncated
--model --preset --train --head-init --head-inputs --lora-rank --lora-alpha
--old-values --cliprange-value --no-clip --loss-agg-mode --loss-scale-factor --lm-loss-weight --lm-loss-ahead
--recipe --epochs --max-steps --batch-size --shuffle --lr --head-lr --optimizer --weight-decay --warmup-steps
--lr-schedule --ema-decay --grad-clip
--on-non-finite --max-skips --seed
--device --precision --packing --attention --max-tokens --activation-checkpointing --offload
--compile --no-compile --nproc --sequence-parallel
--out --dry-run --eval-every --best-by --patience --checkpoint-every --keep --log-every --no-report
--log-to --log-project
""")
EVAL_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length --group-by
--returns --gamma --lam --lam-policy --length-alpha --truncated
--model
--device --precision --packing --attention --max-tokens --nproc --sequence-parallel
--by --cliprange-value --resamples --seed --fail-under --fail-over
--report
""")
PREDICT_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length --group-by
--returns --gamma --lam --lam-policy --length-alpha --truncated
--model
--device --precision --packing --attention --max-tokens
--to --write --baseline --whiten-advantages --part
""")
REPORT_FLAGS = words("runs --tokenizer --to")
SPLIT_FLAGS = words("data --column --on-bad-rows --on-bad-file --max-length --group-by --val-fraction --seed --to")
CHECK_FLAGS = words("data --column --group-by --against --tokenizer --show")
CONVERT_FLAGS = words("""
source --from --column --on-bad-rows --on-bad-file --tokenizer --allow-retokenize --apply-chat-template --group-by
--nproc
--to
""")
EXPORT_FLAGS = words("""
--data --column --on-bad-rows --on-bad-file --max-length
paths
--device --precision --packing --attention --max-tokens
--to --bias
""")
SHOW_FLAGS = words("""
--uid --text --prompt --data --column --on-bad-rows --on-bad-file --max-length
--returns --gamma --lam --lam-policy --length-alpha --truncated
model --tokenizer
--device --precision --packing --attention --max-tokens
--show
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
    "export": EXPORT_FLAGS,
    "show": SHOW_FLAGS,
}


@pytest.mark.parametrize(("command", "flags"), COMMANDS.items())
def test_flags_are_these_and_no_others(command, flags):
    """The surface is frozen: a flag added, renamed or lost has to be so on purpose, here."""
    params = typer.main.get_command(app).commands[command].params
    assert [flag for param in params for flag in (*param.opts, *param.secondary_opts)] == flags + OWN_FLAGS


@pytest.mark.parametrize(("command", "flags"), COMMANDS.items())
def test_command_page_names_every_flag(program, command, flags):
    shown = program(command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    named = words(shown.stdout.replace(",", " "))
    assert [flag for flag in flags if flag.startswith("-") and flag not in named] == []
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_flags_may_not_be_abbreviated(program):
    assert program("fit", "--data", "x", "--epoc", "1").returncode == 2


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("fit --pre", ["--preset", "--precision"]), ("fit --preset ", ["tiny", "small", "base"]), ("ev", ["eval"])],
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
