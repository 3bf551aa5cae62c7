from critic_train_cli.output import as_json_text


def draw_verdict(console, result):
    console.print(as_json_text(result))
