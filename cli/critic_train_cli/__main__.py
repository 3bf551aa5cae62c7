"""`python -m critic_train_cli` is `critic-train`."""

from critic_train_cli.main import run

if __name__ == "__main__":
    run()
