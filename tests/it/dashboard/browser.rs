use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use crate::harness::Guard;

/// A page in headless Chromium, which ends with the pipe that it takes its orders from.
pub(super) struct Page {
    chromium: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    session: Option<String>,
    last_order: u64,
    guard: Guard,
}

/// Chromium takes orders from descriptor 3 and answers on 4.
const SHELL: &str = r#"exec chromium "$@" 3<&0 4>&1"#;

impl Page {
    pub(super) fn open(url: &str) -> Self {
        let mut guard = Guard::new("checkpoint-store-chromium-");
        let mut profile = OsString::from("--user-data-dir=");
        profile.push(guard.folder().join("profile"));
        let log = fs::File::create(guard.folder().join("log")).expect("a log file");
        let mut chromium = Command::new("sh")
            .args(["-c", SHELL, "chromium"])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking"])
            .args(["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"])
            .args(["--remote-debugging-pipe", "--lang=en"])
            .arg(profile)
            .env("HOME", guard.folder())
            .env("TMPDIR", guard.folder())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("a shell");
        guard.watch(&chromium);
        let orders = chromium.stdin.take();
        let answers = BufReader::new(chromium.stdout.take().expect("a pipe"));
        let mut page = Self { chromium, orders, answers, session: None, last_order: 0, guard };
        let target = page.order("Target.createTarget", &json!({ "url": url }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = page.order("Target.attachToTarget", &attach);
        page.session = session["sessionId"].as_str().map(str::to_owned);
        page
    }

    /// What a JavaScript expression gives, as JSON.
    pub(super) fn evaluate(&mut self, expression: &str) -> Value {
        let parameters = json!({ "expression": expression, "returnByValue": true });
        let mut outcome = self.order("Runtime.evaluate", &parameters);
        assert!(outcome.get("exceptionDetails").is_none(), "{expression}: {outcome}");
        outcome["result"]["value"].take()
    }

    /// Gives the page the width of a phone, say.
    pub(super) fn resize(&mut self, width: u32) {
        let metrics =
            json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": true });
        self.order("Emulation.setDeviceMetricsOverride", &metrics);
    }

    fn order(&mut self, method: &str, parameters: &Value) -> Value {
        self.last_order += 1;
        let mut order = json!({ "id": self.last_order, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            order["sessionId"] = json!(session);
        }
        let orders = self.orders.as_mut().expect("taken only when dropped");
        match write!(orders, "{order}\0") {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.gone(),
            written => written.expect("chromium listens"),
        }
        loop {
            let mut message = Vec::new();
            self.answers.read_until(0, &mut message).expect("chromium speaks");
            if message.pop().is_none() {
                self.gone();
            }
            let mut message: Value = serde_json::from_slice(&message).expect("JSON");
            if message["id"] == self.last_order {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
        }
    }

    fn gone(&self) -> ! {
        let log = fs::read_to_string(self.guard.folder().join("log")).unwrap_or_default();
        panic!("chromium is not installed, or does not start: tests/run installs it\n{log}");
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        drop(self.orders.take());
        self.chromium.wait().expect("chromium ends");
        self.guard.forget(&self.chromium);
    }
}
