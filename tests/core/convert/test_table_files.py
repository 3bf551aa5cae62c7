"""Files of Arrow's own."""

import pyarrow as pa
import pytest

from critic_train.convert.table_files import ARROW_ROWS, arrow_batches
from critic_train.errors import DataError


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_rows_come_in_pieces_of_bounded_size(tmp_path, new):
    table = pa.table({"a": list(range(2 * ARROW_ROWS + 5))})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    _, batches = arrow_batches(tmp_path / "a.arrow", "a")
    pieces = [batch.num_rows for batch in batches]
    assert sum(pieces) == len(table)
    assert max(pieces) == ARROW_ROWS


def test_damage_is_told(tmp_path):
    table = pa.table({"a": list(range(1000))})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[:2000])
    (tmp_path / "none.arrow").write_bytes(b"no Arrow at all")
    for name in ("cut.arrow", "none.arrow"):
        with pytest.raises(DataError, match="the Arrow file is damaged"):
            list(arrow_batches(tmp_path / name, name)[1])
