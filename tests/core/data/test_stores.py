"""Shards in an object store: a local server of moto's, through pyarrow's S3; any other through fsspec."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import warm
from support import readable_rollouts, write_shard

from critic_train.data import stores
from critic_train.data.reading import RolloutReader
from critic_train.data.shards import find_shards, fingerprint
from critic_train.data.stores import parquet_file, remote_files
from critic_train.errors import ConfigError, DataError, MachineError
from critic_train.settings import CheckSettings, ConvertSettings, EvalSettings, FitSettings

ROOT = Path(__file__).parents[3]
SECRET = "S3cr3t/that+no-log.may~hold"
KEY = "AKIDEXAMPLE0000"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A store of one bucket, its address and credentials in the environment."""
    pytest.importorskip("moto.server")
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("w") as out:
        # Port 0: the system picks one, and the log says which.
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", "0"], stdout=out, stderr=out)
    try:
        endpoint = _endpoint(log)
        names = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        names |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in names.items():
                patch.setenv(name, value)
            yield Store(endpoint)
    finally:
        process.terminate()
        process.wait()


def _endpoint(log: Path) -> str:
    for _ in range(3000):
        words = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]
        if words:
            return words[0]
        time.sleep(0.1)
    raise RuntimeError(log.read_text())


class Store:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.put("bucket")

    def put(self, place: str, content: bytes = b"") -> None:
        """Make a bucket or an object."""
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"}
        request = urllib.request.Request(f"{self.endpoint}/{place}", data=content, method="PUT", headers=headers)
        urllib.request.urlopen(request).read()


@pytest.fixture(scope="module")
def shards(server, tmp_path_factory):
    """The same shards here and in the store."""
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(12, seed=1))
    write_shard(folder / "deep" / "b.parquet", readable_rollouts(12, seed=2))
    for path in folder.rglob("*.parquet"):
        server.put(f"bucket/rollouts/{path.relative_to(folder)}", path.read_bytes())
    server.put("bucket/rollouts/README.md", b"no shard")
    server.put("bucket/rollouts/_hidden/c.parquet", b"no shard")
    server.put("bucket/rollouts/_convert.json", b"{}")
    return folder


def test_rollouts_and_fingerprint_are_those_of_the_same_files_here(shards):
    here, there = find_shards([str(shards)]), find_shards(["s3://bucket/rollouts"])
    assert [shard.name for shard in there] == ["s3://bucket/rollouts/a.parquet", "s3://bucket/rollouts/deep/b.parquet"]
    assert fingerprint(here) == fingerprint(there)
    assert [(s.num_rows, s.size_bytes, s.footer_digest) for s in here] == [
        (s.num_rows, s.size_bytes, s.footer_digest) for s in there
    ]
    for mine, theirs in zip(RolloutReader(here), RolloutReader(there), strict=True):
        for name in ("input_ids", "offsets", "response_mask", "returns", "values", "group", "row"):
            assert (getattr(mine, name) == getattr(theirs, name)).all()


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("s3://bucket/rollouts/", ["a", "deep/b"]),
        ("s3://bucket/rollouts/a.parquet", ["a"]),
        ("s3://bucket/rollouts/*.parquet", ["a"]),
        ("s3://bucket/rollouts/*/?.parquet", ["deep/b"]),
        ("s3://bucket/rollouts/**/[ab].parquet", ["a", "deep/b"]),
        ("s3://bucket/r*/a.*", ["a"]),
        ("s3a://bucket/rollouts/[!b].parquet", ["a"]),
    ],
)
def test_addresses_lead_to_files_folders_and_patterns(shards, address, names):
    found = [file.address.split("://bucket/rollouts/")[1] for file in remote_files(address, (".parquet",))]
    assert found == [f"{name}.parquet" for name in names]


def test_a_file_larger_than_a_block_is_fetched_once(server, shards, tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.parquet", readable_rollouts(400, seed=3))
    server.put("bucket/large/a.parquet", path.read_bytes())
    monkeypatch.setattr(stores, "BLOCK_BYTES", 10_000)
    fetched = []
    real = stores._fetch.__wrapped__

    @lru_cache(maxsize=stores.CACHED_BLOCKS)
    def fetch(block):
        fetched.append(block.number)
        return real(block)

    monkeypatch.setattr(stores, "_fetch", fetch)
    assert parquet_file("s3://bucket/large/a.parquet").read().equals(pq.read_table(path))
    list(RolloutReader(find_shards(["s3://bucket/large"])))
    assert sorted(fetched) == list(range(-(-path.stat().st_size // 10_000)))


def test_what_is_not_there_is_said_with_its_address(shards):
    with pytest.raises(DataError, match="the store has no Parquet file there") as caught:
        find_shards(["s3://bucket/none", "s3://bucket/rollouts/*.parq"])
    assert "s3://bucket/none" in caught.value.message
    with pytest.raises(DataError, match="no-such-bucket"):
        find_shards(["s3://no-such-bucket/x"])


def test_a_file_that_is_no_parquet_is_named(server, shards):
    server.put("bucket/broken/a.parquet", b"PAR1 and no more")
    with pytest.raises(DataError, match=r"s3://bucket/broken/a\.parquet: the Parquet file is truncated"):
        find_shards(["s3://bucket/broken"])


def test_a_store_that_stops_answering_is_the_machines_fault(shards, monkeypatch):
    (shard,) = find_shards(["s3://bucket/rollouts/a.parquet"])
    stores._fetch.cache_clear()

    class Gone:
        def read_at(self, size, position):
            raise OSError("When reading: AWS Error NETWORK_CONNECTION")

        def close(self):
            pass

    real = stores.RemoteReader.__init__

    def init(self, address):
        real(self, address)
        self._file = Gone()

    monkeypatch.setattr(stores.RemoteReader, "__init__", init)
    with pytest.raises(MachineError, match=r"s3://bucket/rollouts/a\.parquet cannot be read: .*NETWORK"):
        list(RolloutReader([shard]))


def test_other_stores_go_through_fsspec(shards):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in shards.rglob("*.parquet"):
        store.pipe(f"/place/{path.relative_to(shards)}", path.read_bytes())
    there = find_shards(["memory://place"])
    assert fingerprint(there)["digest"] == fingerprint(find_shards([str(shards)]))["digest"]
    assert sum(len(batch) for batch in RolloutReader(there)) == sum(shard.num_rows for shard in there)


def test_a_store_or_package_that_is_missing_says_what_to_install(monkeypatch):
    with pytest.raises(ConfigError, match="no store is known for nowhere://"):
        find_shards(["nowhere://x/y"])
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ConfigError, match="abfs:// needs a package that is not installed") as caught:
        find_shards(["abfs://x/y"])
    assert caught.value.hint == "pip install s3fs gcsfs adlfs"


SETTINGS = {
    "--data": lambda address: FitSettings(data=[address]),
    "--val-data": lambda address: FitSettings(data=["x"], val_data=[address]),
    "data": lambda address: EvalSettings(data=[address]),
    "--against": lambda address: CheckSettings(data=["x"], against=[address]),
    "SOURCE": lambda address: ConvertSettings(source=[address], to="x"),
}


@pytest.mark.parametrize("flag", SETTINGS)
def test_an_address_with_credentials_is_refused_without_being_shown(flag):
    for address in (f"s3://{KEY}:{SECRET}@bucket/x", f"s3://bucket/x?secret_key={SECRET}"):
        with pytest.raises(ConfigError, match="without credentials") as caught:
            SETTINGS[flag](address)
        assert SECRET not in caught.value.message + caught.value.hint
        assert flag in caught.value.message
    SETTINGS[flag]("s3://bucket/**/part-?[0-9].parquet")
    SETTINGS[flag]("hf://datasets/someone/rollouts@main/train")


def program(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The whole program."""
    return warm.program(*arguments, cwd=folder, environment=os.environ | environment)


TRAIN = ["--preset", "tiny", "--max-steps", "2", "--device", "cpu", "--val-fraction", "0.25"]


def test_what_is_read_of_a_store_leaves_the_secret_in_no_file_and_no_line(shards, tmp_path):
    done = [
        program(tmp_path, "fit", "--data", "s3://bucket/rollouts", "--out", "run", *TRAIN),
        program(tmp_path, "convert", "s3://bucket/rollouts", "--to", "shards"),
        program(tmp_path, "eval", "--data", "s3://bucket/none", "--debug"),
        program(tmp_path, "fit", "--data", f"s3://{KEY}:{SECRET}@bucket/rollouts", "--debug"),
    ]
    assert [one.returncode for one in done] == [0, 0, 3, 2], [one.stderr for one in done]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["data"] == ["s3://bucket/rollouts"]
    assert pq.read_table(tmp_path / "shards").num_rows == sum(s.num_rows for s in find_shards([str(shards)]))
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    said = [(one.stdout + one.stderr).encode() for one in done]
    assert not any(SECRET.encode() in content for content in written + said)


@pytest.mark.slow
def test_predict_reads_a_store(shards, tmp_path):
    assert program(tmp_path, "fit", "--data", str(shards), "--out", "run", *TRAIN).returncode == 0
    for data, to in (("s3://bucket/rollouts", "there"), (str(shards), "here")):
        done = program(tmp_path, "predict", "--data", data, "--model", "run", "--to", to)
        assert done.returncode == 0, done.stderr
    names = [
        sorted(str(p.relative_to(tmp_path / to)) for p in (tmp_path / to).rglob("*.parquet"))
        for to in ("here", "there")
    ]
    assert names[0] == names[1] == ["a.parquet", "deep/b.parquet"]
    for name in names[0]:
        assert pq.read_table(tmp_path / "there" / name).equals(pq.read_table(tmp_path / "here" / name))


@pytest.mark.slow
def test_eval_and_check_read_a_store(shards, tmp_path):
    for name in ("eval", "check"):
        where = ["--data"] if name == "eval" else []
        there = program(tmp_path, name, *where, "s3://bucket/rollouts", "--json")
        here = program(tmp_path, name, *where, str(shards), "--json")
        assert (there.returncode, here.returncode) == (0, 0), there.stderr
        mine = here.stdout.replace(f"{shards}/", "s3://bucket/rollouts/").replace(str(shards), "s3://bucket/rollouts")
        assert json.loads(there.stdout) == json.loads(mine)


def test_pickled_and_json_sources_of_a_store_are_fetched_one_at_a_time(server, tmp_path):
    fixtures = ROOT / "tests" / "core" / "convert" / "fixtures"
    server.put("bucket/dumps/step_2.pkl", (fixtures / "verl_dataproto.pkl").read_bytes())
    server.put("bucket/dumps/step_10.pkl", (fixtures / "verl_dataproto_numpy.pkl").read_bytes())
    line = {"input_ids": [1, 2, 3], "response_mask": [0, 1, 1], "reward": 1.0}
    server.put("bucket/dumps/step_11.jsonl", (json.dumps(line) + "\n").encode())
    done = program(tmp_path, "convert", "s3://bucket/dumps", "--to", "shards", "--json", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [source["name"] for source in json.loads(done.stdout)["sources"]] == [
        f"s3://bucket/dumps/{name}" for name in ("step_2.pkl", "step_10.pkl", "step_11.jsonl")
    ]
    assert json.loads(done.stdout)["rollouts"] == 17
    assert not list(tmp_path.glob("critic-train-*"))
    again = program(tmp_path, "convert", "s3://bucket/dumps", "--to", "shards", "--json")
    assert json.loads(again.stdout)["status"] == "already finished"
