// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's monitor, as one client sees it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::DEADLINE;

pub const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;
pub const REGISTERS: &str = "\r\nCPU#0\r\nRIP=0 RFL=1 [-------] CPL=0 II=0\r\n\
    CR0=80050033 CR2=0 CR3=0000000000001802 CR4=001006f0\r\nEFER=0000000000000d01\r\n";

/// A monitor that serves one connection.
pub struct Monitor {
    pub path: PathBuf,
    heard: Receiver<String>,
    _dir: TempDir,
}

impl Monitor {
    /// Of a VM that runs, or does not.
    pub fn of_vm(running: bool) -> Self {
        Self::new(GREETING, move |command| match command {
            "query-status" => Some(json!({ "running": running })),
            "human-monitor-command" => Some(json!(REGISTERS)),
            _ => Some(json!({})),
        })
    }

    /// Says `greeting` and then what `answer` says for each command; what has no answer is refused.
    pub fn new(
        greeting: &'static str,
        answer: impl Fn(&str) -> Option<Value> + Send + 'static,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let (say, heard) = mpsc::channel();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let _ = writeln!(&stream, "{greeting}");
            for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                let line: Value = serde_json::from_str(&line).unwrap();
                let command = line["execute"].as_str().unwrap();
                let reply = match answer(command) {
                    Some(value) => json!({ "return": value, "id": line["id"] }),
                    None => json!({
                        "error": { "class": "GenericError", "desc": "no\u{1b}[2J way" },
                        "id": line["id"],
                    }),
                };
                let _ = say.send(command.to_owned());
                answer_with(&stream, &reply);
            }
        });
        Self {
            path,
            heard,
            _dir: dir,
        }
    }

    /// Commands until the client has gone.
    pub fn commands(self) -> Vec<String> {
        let mut commands = Vec::new();
        loop {
            match self.heard.recv_timeout(DEADLINE) {
                Ok(command) => commands.push(command),
                Err(mpsc::RecvTimeoutError::Disconnected) => return commands,
                Err(e) => panic!("the client stays: {e}, after {commands:?}"),
            }
        }
    }

    /// Waits for one command.
    pub fn expect(&self, command: &str) {
        while self.heard.recv_timeout(DEADLINE).unwrap() != command {}
    }
}

/// With something else before it.
fn answer_with(mut stream: &UnixStream, reply: &Value) {
    let event = json!({ "event": "STOP", "timestamp": {} });
    let _ = stream.write_all(format!("{event}\r\n{reply}\r\n").as_bytes());
}
