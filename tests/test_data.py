import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from fastgpt import data
from fastgpt.config import UserError
from fastgpt.data import Batches, load_dataset, load_text
from fastgpt.tokenizer import CharTokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTGPT_DATA", raising=False)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1000)), encoding="utf-8")
    return path


class TestTokenizer:
    def test_round_trip(self):
        text = "héllo\n\U0001f600 wörld\r\n"
        tokenizer = CharTokenizer.trained_on(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.characters == "".join(sorted(set(text)))
        assert CharTokenizer.from_json(tokenizer.to_json()).encode("wo\n").tolist() == tokenizer.encode("wo\n").tolist()

    def test_ids_are_places_in_the_sorted_characters(self):
        assert CharTokenizer.trained_on("cab").encode("abc").tolist() == [0, 1, 2]

    def test_unknown_characters_are_named(self):
        with pytest.raises(UserError, match=r"vocabulary of 3 characters does not have 'xz'"):
            CharTokenizer.trained_on("abc").encode("azbx")

    @pytest.mark.parametrize("wrong", [{}, {"type": "bpe"}, {"type": "char", "characters": "ba"}, [], {"type": "char"}])
    def test_damaged_json_is_refused(self, wrong):
        with pytest.raises(UserError, match="okenizer"):
            CharTokenizer.from_json(wrong)


def test_split_is_90_to_10_and_memory_mapped(text_file):
    dataset = load_dataset(str(text_file), block_size=8)
    assert isinstance(dataset.train, np.memmap)
    assert dataset.train.dtype == np.uint16
    assert (len(dataset.train), len(dataset.val)) == (900, 100)
    joined = np.concatenate([dataset.train, dataset.val])
    assert dataset.tokenizer.decode(joined) == text_file.read_text()


def test_more_than_65536_characters_take_uint32(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(map(chr, range(0x10000, 0x10000 + 66_000))), encoding="utf-8")
    dataset = load_dataset(str(path), block_size=8)
    assert dataset.train.dtype == np.uint32
    assert int(dataset.val[-1]) == 65_999


def test_tokens_are_made_once_and_anew_when_the_text_changes(text_file):
    first = load_dataset(str(text_file), 8).train.filename
    assert load_dataset(str(text_file), 8).train.filename == first
    text_file.write_text("x" + text_file.read_text())
    assert load_dataset(str(text_file), 8).train.filename != first


def test_damaged_token_files_are_named(text_file):
    dataset = load_dataset(str(text_file), 8)
    with open(dataset.train.filename, "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match=r"train-00000\.bin: damaged: it has .*delete the folder"):
        load_dataset(str(text_file), 8)


def test_an_id_beyond_the_vocabulary_is_a_replacement_character():
    assert CharTokenizer("ab").decode([0, 2, 1]) == "a\ufffdb"


class TestBatches:
    tokens = np.arange(100, dtype=np.uint16)

    def batches(self, seed=0, stream="train", batch_size=64, block_size=9):
        return Batches(self.tokens, batch_size, block_size, seed, stream, torch.device("cpu"))

    def test_targets_are_the_next_tokens(self):
        x, y = self.batches()[0]
        assert x.shape == y.shape == (64, 9)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(9))

    def test_every_start_is_drawn_and_none_beyond(self):
        starts = {int(s) for i in range(100) for s in self.batches()[i][0][:, 0]}
        assert starts == set(range(100 - 9))

    def test_a_function_of_seed_stream_and_index(self):
        assert torch.equal(self.batches()[3][0], self.batches()[3][0])
        others = [self.batches()[4], self.batches(seed=1)[3], self.batches(stream="val")[3]]
        for other in others:
            assert not torch.equal(self.batches()[3][0], other[0])

    def test_the_shortest_text_has_one_start(self):
        x, y = self.batches(block_size=99)[0]
        assert torch.equal(x[0], torch.arange(99))
        assert torch.equal(y[0], torch.arange(1, 100))


class TestBadText:
    def test_an_empty_file(self, tmp_path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(UserError, match=r"empty\.txt: there is no text in it"):
            load_text(str(tmp_path / "empty.txt"))

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "nothing").mkdir()
        with pytest.raises(UserError, match="nothing: there is no text in it"):
            load_text(str(tmp_path / "nothing"))

    def test_no_such_file(self, tmp_path):
        with pytest.raises(UserError, match=r"missing\.txt: cannot be read: No such file"):
            load_text(str(tmp_path / "missing.txt"))

    def test_bytes_that_are_not_utf8(self, tmp_path):
        path = tmp_path / "binary.txt"
        path.write_bytes(b"fine so far \xff\xfe")
        with pytest.raises(UserError, match=r"binary\.txt: not a UTF-8 text \(byte 12"):
            load_text(str(path))

    @pytest.mark.parametrize(("length", "part"), [(5, "training"), (80, "validation")])
    def test_a_text_shorter_than_block_size(self, tmp_path, length, part):
        path = tmp_path / "short.txt"
        path.write_text("ab" * (length // 2) + "a" * (length % 2))
        with pytest.raises(UserError, match=f"too short: its {part} split has .* block_size 16 needs at least 17"):
            load_dataset(str(path), block_size=16)


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("first ")
    (folder / "b" / "c.md").write_text("second")
    (folder / ".hidden").write_text("no")
    (folder / ".git" / "x").write_text("no")
    assert load_text(str(folder)) == (str(folder), "first second")


def test_line_ends_are_kept_as_they_are(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r\n")
    assert load_text(str(tmp_path / "dos.txt"))[1] == "a\r\nb\r\n"


def test_the_standard_library_is_a_long_text():
    name, text = load_text("stdlib")
    assert name == "stdlib"
    assert len(text) > 1_000_000
    assert "def " in text


def test_the_standard_library_is_without_tests_and_other_peoples_packages(tmp_path, monkeypatch):
    for folder in ("", "json", "test", "json/tests", "site-packages/torch", "dist-packages", "__pycache__"):
        (tmp_path / "lib" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / folder / "module.py").write_text(f"{folder or 'top'}\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert load_text("stdlib")[1].split() == ["json", "top"]


class TestShakespeare:
    content = b"First Citizen:\nSpeak, speak.\n" * 50

    @pytest.fixture(autouse=True)
    def known_content(self, monkeypatch):
        monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(self.content).hexdigest())
        monkeypatch.setattr(data, "SHAKESPEARE_URL", "http://127.0.0.1:9/nothing-listens-here")

    def serve(self, content, pause=0.0):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                for i in range(0, len(content), 64):
                    try:
                        self.wfile.write(content[i : i + 64])
                    except OSError:
                        return
                    time.sleep(pause)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}/input.txt"

    def test_found_by_fastgpt_data(self, tmp_path, monkeypatch):
        (tmp_path / "tinyshakespeare.txt").write_bytes(self.content)
        monkeypatch.setenv("FASTGPT_DATA", str(tmp_path))
        assert load_text("shakespeare") == ("shakespeare", self.content.decode())

    def test_another_file_of_that_name_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "tinyshakespeare.txt").write_bytes(b"something else")
        monkeypatch.setenv("FASTGPT_DATA", str(tmp_path))
        with pytest.raises(UserError, match="this is not Tiny Shakespeare"):
            load_text("shakespeare")

    def test_downloaded_once_into_the_cache(self, monkeypatch):
        server, url = self.serve(self.content)
        monkeypatch.setattr(data, "SHAKESPEARE_URL", url)
        assert load_text("shakespeare") == ("shakespeare", self.content.decode())
        server.shutdown()
        assert load_text("shakespeare") == ("shakespeare", self.content.decode())

    @pytest.mark.parametrize("fault", ["nothing listens", "other content", "too slow"])
    def test_stdlib_stands_in_after_one_line_that_says_why(self, monkeypatch, fault):
        if fault == "other content":
            monkeypatch.setattr(data, "SHAKESPEARE_URL", self.serve(b"tampered with")[1])
        elif fault == "too slow":
            monkeypatch.setattr(data, "SHAKESPEARE_URL", self.serve(self.content, pause=0.1)[1])
            monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 0.5)
        lines = []
        began = time.monotonic()
        name, text = load_text("shakespeare", lines.append)
        assert name == "stdlib"
        assert len(text) > 1_000_000
        assert len(lines) == 1
        reason = {"nothing listens": "refused", "other content": "another sha256", "too slow": "did not arrive"}[fault]
        assert reason in lines[0]
        assert "standard library instead" in lines[0]
        assert time.monotonic() - began < 10
        assert not list(data.cache_dir().glob("*.txt"))
