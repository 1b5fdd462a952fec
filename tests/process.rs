// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program as an operator meets it: sockets, signals, errors, and many connections.

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use common::front_end::regions;
use common::*;
use vhost::VhostBackend;

#[test]
fn sigterm_and_sigint_end_it_with_status_0_and_no_socket_left() {
    for signal in ["-TERM", "-INT"] {
        let mut companion = Companion::start();
        companion.signal(signal);
        assert_eq!(companion.wait().code(), Some(0));
        assert_eq!(companion.files(), ["log"]);
    }
}

#[test]
fn sigterm_ends_it_with_a_request_under_way() {
    let mut s = Setup::new();
    s.guest.lock(&[(1, 1, NOWRITE)]);
    s.front_end.kick(0);
    s.vm_guard.protect();
    s.companion.signal("-TERM");
    assert_eq!(s.companion.wait().code(), Some(0));
    assert_eq!(s.companion.files(), ["log"]);
}

#[test]
fn a_second_one_in_the_same_place_is_told_and_harms_nothing() {
    let mut s = Setup::new();
    for args in [
        vec!["--socket-path".into(), s.companion.socket_path()],
        vec![
            "--socket-path".into(),
            s.companion.dir.path().join("other"),
            "--control-path".into(),
            s.companion.control_path(),
        ],
    ] {
        let output = Companion::command().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.starts_with("vhost-guard: error: "), "{error}");
        assert!(
            error.contains("already in use by a running process"),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1);
    }
    assert!(!s.companion.dir.path().join("other").exists());
    s.assert_works();
}

#[test]
fn of_several_started_at_once_exactly_one_wins() {
    for _ in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        // What a killed one has left.
        drop(UnixListener::bind(dir.path().join("s")).unwrap());
        let mut children: Vec<_> = (0..4)
            .map(|_| {
                Companion::command()
                    .arg("--socket-path")
                    .arg(dir.path().join("s"))
                    .args(["--log-level", "off"])
                    .stderr(std::process::Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        wait_for("three to give up", || {
            let ended = children.iter_mut().filter_map(|c| c.try_wait().unwrap());
            let codes: Vec<_> = ended.map(|status| status.code()).collect();
            assert!(codes.iter().all(|&code| code == Some(1)), "{codes:?}");
            (codes.len() == 3).then_some(())
        });
        wait_for("the winner to listen", || {
            UnixStream::connect(dir.path().join("s")).ok()
        });
        for mut child in children {
            let _ = child.kill();
            child.wait().unwrap();
        }
    }
}

#[test]
fn a_place_whose_lock_is_held_is_in_use_even_before_its_socket_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let lock = fs::File::create(dir.path().join("s.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let output = Companion::command()
        .arg("--socket-path")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("already in use")
    );
    assert!(dir.path().join("s.lock").exists(), "the holder's lock");
}

#[test]
fn what_is_not_a_socket_is_never_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    fs::write(&path, "data").unwrap();
    let output = Companion::command()
        .arg("--socket-path")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("is not a socket")
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    assert_eq!(
        fs::read_dir(&dir).unwrap().count(),
        1,
        "something was left behind"
    );
}

#[test]
fn a_socket_that_somebody_else_listens_on_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs");
    let listener = UnixListener::bind(&path).unwrap();
    let output = Companion::command()
        .arg("--socket-path")
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("already in use")
    );
    UnixStream::connect(&path).unwrap();
    drop(listener);
}

#[test]
fn errors_are_one_line_with_what_to_do() {
    let cases: [(&[&str], i32, &str); 5] = [
        (
            &["--socket-path", "/nonexistent/dir/s"],
            1,
            "check the directory",
        ),
        (
            &["--fd", "77", "--control-fd", "78"],
            1,
            "pass a listening UNIX stream socket",
        ),
        (&["--fd", "0", "--control-fd", "78"], 1, "above 2"),
        (&["--fd", "3"], 2, "--control-path"),
        (&[], 2, "--socket-path"),
    ];
    for (args, code, text) in cases {
        let output = Companion::command().args(args).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(text), "{error}");
        assert!(code == 2 || error.lines().count() == 1, "{error}");
    }
}

#[test]
fn capabilities_are_json_on_standard_output() {
    let output = Companion::command()
        .arg("--print-capabilities")
        .output()
        .unwrap();
    assert!(output.status.success());
    let text: String = String::from_utf8(output.stdout)
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(text, r#"{"type":"guard","features":[]}"#);
}

#[test]
fn listening_sockets_can_be_passed() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [dir.path().join("front"), dir.path().join("control")];
    let listeners = paths
        .each_ref()
        .map(|path| UnixListener::bind(path).unwrap());
    for listener in &listeners {
        rustix::io::fcntl_setfd(listener, rustix::io::FdFlags::empty()).unwrap();
    }
    let [front, control] = listeners.each_ref().map(|l| l.as_raw_fd().to_string());
    let mut child = Companion::command()
        .args([
            "--fd",
            &front,
            "--control-fd",
            &control,
            "--log-level",
            "off",
        ])
        .spawn()
        .unwrap();
    drop(listeners);
    let mut control = UnixStream::connect(&paths[1]).unwrap();
    let mut hello = [0; 24];
    std::io::Read::read_exact(&mut control, &mut hello).unwrap();
    let front_end =
        vhost::vhost_user::Frontend::from_stream(UnixStream::connect(&paths[0]).unwrap(), 2);
    front_end.get_features().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_thousand_connections_leave_nothing_behind() {
    let companion = Companion::start();
    let guest = Guest::new();
    let _vm_guard = VmGuard::connect(&companion);
    let cycle = |i: usize| {
        let mut front_end = FrontEnd::connect(&companion, &guest);
        assert_eq!(front_end.config().deny_bits(), NOWRITE, "{i}");
    };
    let settled = |companion: &Companion| {
        // A connection that is being served needs more descriptors than one that is waited for.
        let front_end = FrontEnd::connect(companion, &guest);
        let descriptors = companion.descriptors();
        drop(front_end);
        descriptors
    };
    cycle(0);
    let before = settled(&companion);
    for i in 0..1000 {
        cycle(i);
    }
    assert_eq!(settled(&companion), before);
    assert!(
        companion.log_lines("front end connected") < 500,
        "the log is flooded"
    );
}

#[test]
fn control_connections_leave_nothing_behind() {
    let companion = Companion::start();
    let _front_end = FrontEnd::negotiate(&companion, !0);
    drop(VmGuard::connect_silently(&companion));
    let vm_guard = VmGuard::connect_silently(&companion);
    let before = companion.descriptors();
    drop(vm_guard);
    for _ in 0..200 {
        VmGuard::connect_silently(&companion);
    }
    let _vm_guard = VmGuard::connect_silently(&companion);
    assert_eq!(companion.descriptors(), before);
}

#[test]
fn nonsense_on_the_vhost_user_socket_closes_that_connection_only() {
    let mut companion = Companion::start();
    let _vm_guard = VmGuard::connect(&companion);
    let header = |request: u32, flags: u32, size: u32| {
        [
            request.to_le_bytes(),
            flags.to_le_bytes(),
            size.to_le_bytes(),
        ]
        .concat()
    };
    let cases = [
        vec![0xff; 4096],
        vec![0; 12],
        header(1, 1, 0)[..5].to_vec(),
        header(1, 1, 8),
        header(999, 1, 0),
        header(1, 1, 0xffff_ffff),
        // SET_STATUS, SET_VRING_NUM for queue 7, SET_MEM_TABLE with no descriptor.
        [header(39, 1, 8), vec![0; 8]].concat(),
        [header(8, 9, 8), vec![7, 0, 0, 0, 64, 0, 0, 0]].concat(),
        [header(5, 9, 40), vec![1; 40]].concat(),
    ];
    for bytes in cases {
        let mut stream = UnixStream::connect(companion.socket_path()).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut rest);
        companion.assert_runs();
    }
    let guest = Guest::new();
    assert_eq!(
        FrontEnd::connect(&companion, &guest).config().deny_bits(),
        NOWRITE
    );
}

#[test]
fn a_region_larger_than_its_file_is_refused() {
    let mut companion = Companion::start();
    let guest = Guest::new();
    let front_end = FrontEnd::negotiate(&companion, !0);
    let mut regions = regions(&guest);
    regions[0].memory_size *= 2;
    assert!(front_end.frontend.set_mem_table(&regions).is_err());
    companion.wait_for_log("its file has");
    companion.assert_runs();
    FrontEnd::connect(&companion, &guest);
}

#[test]
fn the_death_of_the_queues_thread_closes_the_connection() {
    let mut s = Setup::new();
    s.assert_works();
    // What the crate does not survive: a kick on a descriptor that was replaced.
    let old = s.front_end.replace_kick(0);
    old.write(1).unwrap();
    s.companion
        .wait_for_log("the thread that serves the queues has died");
    s.front_end.assert_closed();
    s.front_end = FrontEnd::connect(&s.companion, &s.guest);
    let head = s.guest.lock(&[(0x10, 0x10, NOWRITE)]);
    s.front_end.kick(0);
    let protect = s.vm_guard.protect();
    s.vm_guard.succeed(&protect);
    assert_eq!(s.guest.response(head).status, 0);
}

#[test]
fn every_part_of_the_configuration_space_can_be_read_and_none_written() {
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::vhost_user::message::VhostUserConfigFlags;

    let mut s = Setup::new();
    let all = s.front_end.config_bytes(0, 72);
    for (offset, size) in [(0, 1), (8, 8), (24, 40), (64, 8), (71, 1)] {
        let part = &all[offset as usize..(offset + size) as usize];
        assert_eq!(s.front_end.config_bytes(offset, size), part);
    }
    assert_eq!(
        s.front_end.config_bytes(68, 100),
        [&all[68..], &[0; 96]].concat()
    );
    assert_eq!(s.front_end.config_bytes(200, 56), [0; 56]);
    s.front_end
        .frontend
        .set_config(0, VhostUserConfigFlags::empty(), &[0xff; 72])
        .unwrap();
    assert_eq!(s.front_end.config_bytes(0, 72), all);
}
