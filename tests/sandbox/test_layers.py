"""Layers: the same tree gives the same bytes, unpacking gives the tree back, and hostile tars stay inside."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelagos.errors import SandboxError
from pelagos.sandbox import Image, Store
from pelagos.sandbox.inside import OPAQUE, WHITEOUT, pack_tree
from pelagos.sandbox.layers import remove_tree, unpack


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that starts no sandbox, so it needs no program."""
    return Store(tmp_path_factory.mktemp("layers"))


def packed(directory: Path, **options: Any) -> bytes:
    file = io.BytesIO()
    fd = os.open(directory, os.O_RDONLY)
    try:
        pack_tree(fd, file, **options)
    finally:
        os.close(fd)
    return file.getvalue()


def tar_of(*entries: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info, data = tarfile.TarInfo(entry["name"]), entry.get("data", b"")
            info.size = len(data)
            for name in entry.keys() - {"name", "data"}:
                setattr(info, name, entry[name])
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)
trees = st.recursive(
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda t: ("link", t), names),
        st.just(("fifo", "")),
        st.just(("whiteout", "")),
    ),
    lambda children: st.dictionaries(names, children, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def grow(directory: Path, tree: Any) -> None:
    for name, node in tree.items():
        path = directory / name
        if isinstance(node, dict):
            path.mkdir()
            grow(path, node)
        elif isinstance(node, bytes):
            path.write_bytes(node)
            path.chmod(0o751 if len(node) % 2 else 0o4640)
            os.utime(path, ns=(len(node) * 1_000_000_007, len(node) * 1_000_000_007))
        elif node[0] == "link":
            path.symlink_to(node[1])
        elif node[0] == "fifo":
            os.mkfifo(path)
        else:
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_pack_of_unpack_is_the_same_bytes(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    grow(first, tree)
    data = packed(first)
    unpack(io.BytesIO(data), second)
    assert packed(second) == data
    assert {p.name for p in second.iterdir()} == set(tree)


def test_links_modes_and_opaque_directories_survive(plain: Store, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"x")
    os.link(tmp_path / "d" / "a", tmp_path / "b")
    (tmp_path / "d").chmod(0o711)
    os.setxattr(tmp_path / "d", "user.overlay.opaque", b"y")
    tree = plain.layers / plain.add_directory(tmp_path)
    assert (tree / "b").stat().st_ino == (tree / "d" / "a").stat().st_ino
    assert stat.S_IMODE((tree / "d").stat().st_mode) == 0o711
    assert os.getxattr(tree / "d", "user.overlay.opaque") == b"y"
    data = packed(tree)
    assert plain.add_tar(io.BytesIO(data)) == tree.name
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(i.name, OPAQUE in i.pax_headers, i.islnk()) for i in tar] == [
            ("b", False, False), ("d", True, False), ("d/a", False, True),
        ]  # fmt: skip


def test_a_layer_is_stored_once_and_named_by_content(plain: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("same")
    before = len(list(plain.layers.iterdir()))
    image = Image("none", ()).with_directory(tmp_path, at="/a/b", store=plain)
    assert image.with_directory(tmp_path, at="a//b", store=plain).layers == image.layers * 2
    assert len(list(plain.layers.iterdir())) == before + 1
    assert (plain.layers / image.layers[0] / "a/b/f").read_text() == "same"
    os.utime(tmp_path / "f", ns=(1, 1))
    assert image.with_directory(tmp_path, at="/a/b", store=plain).layers[1] != image.layers[0]


def test_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 30)
    with pytest.raises(ValueError, match="raise disk_mb"):
        packed(tmp_path, most=1 << 20)


@pytest.mark.parametrize(
    "entries",
    [
        [{"name": "../out", "data": b"x"}],
        [{"name": "a/../../out", "data": b"x"}],
        [{"name": "a", "type": tarfile.SYMTYPE, "linkname": ".."}, {"name": "a/out", "data": b"x"}],
        [{"name": "a", "type": tarfile.SYMTYPE, "linkname": "/tmp"}, {"name": "a", "type": tarfile.DIRTYPE}],
        [{"name": "a", "type": tarfile.LNKTYPE, "linkname": "../../outside"}],
        [{"name": "a", "type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}],
        [
            {"name": "s", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            {"name": "a", "type": tarfile.LNKTYPE, "linkname": "s"},
        ],
        [{"name": "null", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}],
        [{"name": "disk", "type": tarfile.BLKTYPE, "devmajor": 8}],
        [{"name": "d/x", "data": b""}, {"name": "d", "data": b"not a directory now"}],
        [{"name": "a\0b", "data": b"x", "pax_headers": {"path": "x\0y"}}],
    ],
    ids=lambda entries: entries[0]["name"].encode().hex()[:8],
)
def test_hostile_tars_are_refused_and_touch_nothing_outside(
    plain: Store, tmp_path: Path, entries: list[dict[str, Any]]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (plain.root, plain.layers, tmp_path)}
    drafts = set(plain.layers.iterdir())
    with pytest.raises(SandboxError, match="layer: "):
        plain.add_tar(tar_of(*entries))
    assert set(plain.layers.iterdir()) == drafts
    assert not list(tmp_path.parent.glob("out*"))
    assert before[tmp_path] == tmp_path.stat().st_mtime_ns


def test_a_link_replaced_by_a_file_is_written_inside(plain: Store, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    link = {"name": "a", "type": tarfile.SYMTYPE, "linkname": str(victim)}
    digest = plain.add_tar(tar_of(link, {"name": "a", "data": b"evil"}))
    assert victim.read_text() == "untouched"
    assert (plain.layers / digest / "a").read_bytes() == b"evil"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_damaged_tars_are_refused_or_unpacked_inside(plain: Store, place: int, byte: int, cut: int) -> None:
    data = bytearray(
        tar_of({"name": "d/a", "data": b"a" * 700}, {"name": "b", "type": tarfile.SYMTYPE, "linkname": "a"}).getvalue()
    )
    data[place % len(data)] = byte
    digest = None
    with contextlib.suppress(SandboxError):
        digest = plain.add_tar(io.BytesIO(bytes(data[: cut % (2 * len(data))])))
    assert digest is None or (plain.layers / digest).is_dir()
    assert not [p for p in plain.layers.iterdir() if p.name.startswith("draft-")]


def test_whiteouts_are_headers_and_names_mean_nothing(plain: Store, tmp_path: Path) -> None:
    (tmp_path / ".wh.file").write_text("just a name")
    os.mknod(tmp_path / "gone", stat.S_IFCHR, os.makedev(0, 0))
    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path))) as tar:
        assert {i.name: WHITEOUT in i.pax_headers for i in tar} == {".wh.file": False, "gone": True}


def test_the_host_frame_holds_no_secret(plain: Store) -> None:
    tree = plain.layers / Image.host(plain).layers[0]
    assert Image.host(plain).layers == Image.host(Store(plain.root)).layers
    assert not {"shadow", "gshadow", "sudoers", "ssh", "machine-id", "fstab"} & {
        p.name for p in (tree / "etc").iterdir()
    }
    for path in (p for p in tree.rglob("*") if p.is_file() and not p.is_symlink()):
        assert b"PRIVATE KEY-----" not in path.read_bytes(), path
        assert path.stat().st_mode & 0o6000 == 0


def test_trees_that_forbid_deleting_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "t" / "a" / "b").mkdir(parents=True)
    (tmp_path / "t" / "a" / "b" / "f").touch()
    (tmp_path / "t" / "a" / "b").chmod(0)
    (tmp_path / "t" / "a").chmod(0)
    remove_tree(tmp_path / "t")
    remove_tree(tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 65, ".hidden", "caf\u00e9"])
def test_ids_that_are_no_names(plain: Store, name: str) -> None:
    with pytest.raises(SandboxError, match="sandbox id"):
        plain.box(name)


def test_collect_takes_what_is_old_and_unused(tmp_path: Path) -> None:
    from pelagos.sandbox.sdk import Sandbox

    store = Store(tmp_path / "s")
    source = tmp_path / "d"
    source.mkdir()
    (source / "f").write_text("x")
    image = Image.host(store)
    kept = image.with_directory(source, at="/workspace", store=store)
    (source / "f").write_text("y")
    lost = image.with_directory(source, at="/workspace", store=store)
    for digest in {*kept.layers, *lost.layers}:
        os.utime(store.layers / digest, (0, 0))
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap (Debian package bubblewrap) is not installed")
    with Sandbox.create(image=kept, store=store) as box:
        for digest in kept.layers:
            os.utime(store.layers / digest, (0, 0))
        (store.boxes / "begun").mkdir()
        for place in (store.boxes / "begun", box.directory):
            os.utime(place, (0, 0))
        assert store.collect(older_s=60) == {"layers": 1, "snapshots": 0, "boxes": 1}
        assert box.exec("cat f").text == "x"
    assert store.collect(older_s=60) == {"layers": 2, "snapshots": 0, "boxes": 0}
    with pytest.raises(SandboxError, match="is not in"):
        Sandbox.create(image=lost, store=store)


def oci_layout(place: Path, *layers: bytes, **facts: Any) -> Path:
    """Write an OCI layout of these layers (tars, squeezed) and return its directory."""

    def blob(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (place / "blobs/sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    (place / "blobs/sha256").mkdir(parents=True)
    squeezed = [blob(gzip.compress(layer, mtime=0)) for layer in layers]
    manifest = blob(json.dumps({"schemaVersion": 2, "layers": squeezed} | facts).encode())
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    other = manifest | {"platform": {"os": "linux", "architecture": "s390x"}, "digest": "sha256:" + "0" * 64}
    ours = manifest | {"platform": {"os": "linux", "architecture": machine}}
    index = blob(json.dumps({"manifests": [other, ours]}).encode())
    (place / "index.json").write_text(json.dumps({"manifests": [index]}))
    return place


BOTTOM = ({"name": "opt/a/old", "data": b"old"}, {"name": "opt/gone", "data": b"x"}, {"name": "opt/kept", "data": b"1"},
          {"name": "dev/sda", "type": tarfile.BLKTYPE, "devmajor": 8})  # fmt: skip
TOP = ({"name": "opt/a/.wh..wh..opq"}, {"name": "opt/a/new", "data": b"new"}, {"name": "opt/.wh.gone"})


def test_oci_images_are_layers_with_their_whiteouts(make: Any, store: Store, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", tar_of(*BOTTOM).getvalue(), tar_of(*TOP).getvalue())
    image = Image.from_oci(layout, store=store)
    assert (image.base, len(image.layers)) == ("none", 3)
    archive = tmp_path / "image.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout, arcname=".", recursive=False)
        for path in sorted(p for p in layout.rglob("*") if p.is_file()):
            tar.add(path, arcname=str(path.relative_to(layout)))
    assert Image.from_oci(archive, store=store) == image
    saved = tmp_path / "saved.tar"  # docker save of old
    with tarfile.open(saved, "w") as tar:
        for n, entries in enumerate((BOTTOM, TOP)):
            data = tar_of(*entries)
            info = tarfile.TarInfo(f"{n}/layer.tar")
            info.size = len(data.getvalue())
            tar.addfile(info, data)
        manifest = json.dumps([{"Layers": ["0/layer.tar", "1/layer.tar"]}]).encode()
        info = tarfile.TarInfo("manifest.json")
        info.size = len(manifest)
        tar.addfile(info, io.BytesIO(manifest))
    assert Image.from_oci(saved, store=store) == image
    toolkit = Image("none", ()).with_directory(Path(__file__).parent / "..", at="/toolkit", store=store)
    composed = Image.host(store).compose(image, toolkit, image)
    assert len(composed.layers) == len(set(composed.layers)) == 5
    box = make(image=composed)
    assert box.exec("cd /opt; find . -type f | sort; cat kept a/new; ls /toolkit/sandbox | grep -c layers").text == (
        "./a/new\n./kept\n1new1\n"
    )
    with pytest.raises(SandboxError, match="cannot go on one"):
        image.compose(Image.host(store))


def test_damaged_and_hostile_oci_images_are_refused(plain: Store, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", tar_of(*BOTTOM).getvalue())
    for blob in (layout / "blobs/sha256").iterdir():
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(SandboxError, match="damaged"):
            Image.from_oci(layout, store=plain)
        blob.write_bytes(whole)
    for index in (
        "",
        "[]",
        "{}",
        '{"manifests": []}',
        '{"manifests": [{"digest": "sha256:../../x"}]}',
        '{"layers": 5}',
    ):
        (layout / "index.json").write_text(index)
        with pytest.raises(SandboxError):
            Image.from_oci(layout, store=plain)
    hostile = oci_layout(tmp_path / "hostile", tar_of({"name": "a/../../x", "data": b"x"}).getvalue())
    odd = oci_layout(tmp_path / "odd", tar_of({"name": "a/.wh..."}).getvalue())
    for bad in (hostile, odd, tmp_path / "none", Path(__file__)):
        with pytest.raises(SandboxError):
            Image.from_oci(bad, store=plain)
    assert not [p for p in plain.layers.iterdir() if p.name.startswith("draft")]


@pytest.mark.slow
def test_debootstrap_makes_a_system_of_its_own(make: Any, store: Store) -> None:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        pytest.skip("needs debootstrap, root and a mirror")
    box = make(image=Image.debootstrap("bookworm", packages=["python3-minimal"], store=store))
    assert box.exec("python3 -c 'print(6*7)'; ls /usr/share/doc | wc -l").text.startswith("42\n")
    with pytest.raises(SandboxError, match="no name"):
        Image.debootstrap("--help", store=store)
