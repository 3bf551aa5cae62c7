from critic_train_cli.output import as_json_text


def draw_summary(console, ended, settings, losses):
    console.print(as_json_text(ended.result))
