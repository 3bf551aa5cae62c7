"""The live view."""

from critic_train_cli.views import PlainView


class LiveView(PlainView):
    """Plain lines until it is drawn."""
