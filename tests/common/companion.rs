// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The companion as a process.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use tempfile::TempDir;

use super::{DEADLINE, wait_for};

pub struct Companion {
    child: Child,
    pub dir: TempDir,
    log: PathBuf,
}

impl Companion {
    pub fn start() -> Self {
        Self::start_in(TempDir::new().unwrap())
    }

    /// Starts one with more options, in which a path is relative to its directory.
    pub fn start_with(args: &[&str]) -> Self {
        Self::start_in_with(TempDir::new().unwrap(), args)
    }

    /// Starts one that makes its sockets in `dir`, and waits until it listens.
    pub fn start_in(dir: TempDir) -> Self {
        Self::start_in_with(dir, &[])
    }

    pub fn start_in_with(dir: TempDir, args: &[&str]) -> Self {
        Self::start_command(Self::command(), dir, args)
    }

    pub fn start_command(command: Command, dir: TempDir, args: &[&str]) -> Self {
        let mut companion = Self::spawn_in(command, dir, args);
        companion.wait_for_log("listening:");
        companion.assert_runs();
        companion
    }

    fn spawn_in(mut command: Command, dir: TempDir, args: &[&str]) -> Self {
        let log = dir.path().join("log");
        let child = command
            .arg("--socket-path")
            .arg(dir.path().join("guard.sock"))
            .args(args)
            .current_dir(dir.path())
            .stderr(File::create(&log).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, dir, log }
    }

    pub fn command() -> Command {
        Command::new(env!("CARGO_BIN_EXE_vhost-guard"))
    }

    pub fn socket_path(&self) -> PathBuf {
        self.dir.path().join("guard.sock")
    }

    pub fn control_path(&self) -> PathBuf {
        self.dir.path().join("guard.sock.ctl")
    }

    pub fn status_path(&self) -> PathBuf {
        self.dir.path().join("guard.sock.status")
    }

    /// What its status socket says.
    pub fn status(&self) -> serde_json::Value {
        let mut stream = UnixStream::connect(self.status_path()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut document = Vec::new();
        stream.read_to_end(&mut document).unwrap();
        serde_json::from_slice(&document).unwrap()
    }

    pub fn connect_control(&self) -> UnixStream {
        UnixStream::connect(self.control_path()).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Lines of the log that have `text` in them.
    pub fn log_lines(&self, text: &str) -> usize {
        self.log()
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }

    pub fn wait_for_log(&self, text: &str) {
        self.wait_for_log_lines(text, 1);
    }

    pub fn wait_for_log_lines(&self, text: &str, count: usize) {
        wait_for(&format!("{count} times {text:?} in the log"), || {
            (self.log_lines(text) >= count).then_some(())
        });
    }

    /// Names of what lies in its directory.
    pub fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn assert_runs(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "{}", self.log());
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .arg(signal)
            .arg(self.pid().to_string())
            .status()
            .unwrap();
        assert!(status.success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the companion", || {
            self.child.try_wait().unwrap()
        })
    }

    /// Kills it as `kill -9` does, and starts another in the same place.
    pub fn kill_and_restart(self) -> Self {
        self.kill_and_restart_with(&[])
    }

    pub fn kill_and_restart_with(mut self, args: &[&str]) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let dir = std::mem::replace(&mut self.dir, TempDir::new().unwrap());
        Self::start_in_with(dir, args)
    }

    /// Clock ticks of processor time that it has used.
    pub fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    pub fn descriptors(&self) -> usize {
        fs::read_dir(Path::new("/proc").join(self.pid().to_string()).join("fd"))
            .unwrap()
            .count()
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking()
            && let Ok(log) = fs::read_to_string(&self.log)
        {
            eprintln!("--- log of the companion ---\n{log}---");
        }
    }
}
