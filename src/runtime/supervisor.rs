//! Supervision of tasks that run for the lifetime of the process. Without one of them, a process would hold its lease
//! and do nothing, or answer from outdated state. Therefore the process stops when a task returns or panics, and logs
//! the task and the reason.

use std::{collections::HashMap, fmt, io, time::Duration};

use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, timeout_at},
};

/// A group of tasks, each with a name for messages.
#[derive(Debug, Default)]
pub struct Supervisor {
    tasks: JoinSet<String>,
    names: HashMap<Id, &'static str>,
}

/// A task that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedTask {
    /// Its name, such as "the controller of ApiKeys".
    pub task: &'static str,
    /// The reason, as a clause.
    pub why: String,
}

impl std::error::Error for EndedTask {}

impl fmt::Display for EndedTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ended unexpectedly: {}", self.task, self.why)
    }
}

/// The return value of a task.
pub trait TaskOutcome {
    /// The reason for the end, as a clause.
    fn why(self) -> String;
}

impl TaskOutcome for () {
    fn why(self) -> String {
        "it returned".to_owned()
    }
}

impl TaskOutcome for io::Result<()> {
    fn why(self) -> String {
        self.map_or_else(|error| error.to_string(), TaskOutcome::why)
    }
}

impl Supervisor {
    /// Starts a task.
    pub fn spawn<T: TaskOutcome>(&mut self, name: &'static str, task: impl Future<Output = T> + Send + 'static) {
        let task = self.tasks.spawn(async move { task.await.why() });
        self.names.insert(task.id(), name);
    }

    /// Waits until a task ends. Waits forever if there is none.
    pub async fn ended(&mut self) -> EndedTask {
        match self.next().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// Waits until all tasks have ended, up to `timeout`, and then aborts the others. The caller has asked them to
    /// stop.
    pub async fn finish(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while let Ok(ended) = timeout_at(deadline, self.next()).await {
            if ended.is_none() {
                return;
            }
        }
        let running: Vec<_> = self.names.values().copied().collect();
        tracing::warn!(tasks = running.join(", "), "abort tasks that did not stop within {}s", timeout.as_secs());
        self.abort().await;
    }

    /// Aborts all tasks and waits until they have ended.
    pub async fn abort(&mut self) {
        self.tasks.shutdown().await;
        self.names.clear();
    }

    async fn next(&mut self) -> Option<EndedTask> {
        let (id, why) = match self.tasks.join_next_with_id().await? {
            Ok((id, why)) => (id, why),
            Err(error) => (error.id(), describe(error)),
        };
        Some(EndedTask { task: self.names.remove(&id).unwrap_or("a task"), why })
    }
}

fn describe(error: JoinError) -> String {
    let Ok(payload) = error.try_into_panic() else { return "it was aborted".to_owned() };
    let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    match text {
        Some(text) => format!("it panicked: {text}"),
        None => "it panicked".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Shutdown, TcpListener, TcpStream};

    use axum::Router;
    use tokio::time::sleep;

    use super::*;
    use crate::net::listener::{self, ConnectionLimit};

    fn spawn_endless(group: &mut Supervisor) {
        group.spawn("another", std::future::pending::<()>());
    }

    #[tokio::test]
    async fn the_end_of_a_task_is_reported_with_name_and_reason() {
        type Spawn = fn(&mut Supervisor);
        let cases: [(Spawn, &str); 4] = [
            (|group| group.spawn("it", async {}), "it returned"),
            (|group| group.spawn("it", async { Err::<(), _>(io::Error::other("no socket")) }), "no socket"),
            (|group| group.spawn("it", async { panic!("no {}", "memory") as () }), "it panicked: no memory"),
            (|group| group.spawn("it", async { std::panic::panic_any(7) as () }), "it panicked"),
        ];
        for (spawn, why) in cases {
            let mut group = Supervisor::default();
            spawn_endless(&mut group);
            spawn(&mut group);
            let ended = tokio::time::timeout(Duration::from_secs(5), group.ended()).await.expect("the end is reported");
            assert_eq!(ended, EndedTask { task: "it", why: why.to_owned() });
            assert!(ended.to_string().contains("ended unexpectedly"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn finish_waits_for_tasks_and_aborts_them_at_the_timeout() {
        let mut group = Supervisor::default();
        group.spawn("a quick one", sleep(Duration::from_secs(2)));
        let begin = Instant::now();
        group.finish(Duration::from_secs(10)).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(2));
        group.spawn("a quick one", sleep(Duration::from_secs(2)));
        spawn_endless(&mut group);
        group.finish(Duration::from_secs(10)).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(12));
        assert!(group.tasks.is_empty() && group.names.is_empty());
    }

    /// Uses the real listener, on a socket that stops listening.
    #[tokio::test]
    async fn the_listener_ends_when_its_socket_stops_listening() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        // A second descriptor of the same socket. `TcpListener` has no shutdown.
        let same = TcpStream::from(std::os::fd::OwnedFd::from(socket.try_clone().unwrap()));
        let mut group = Supervisor::default();
        let server =
            listener::serve(socket, None, axum_server::Handle::new(), ConnectionLimit::new(1), Router::<()>::new);
        group.spawn("the listener", server);
        tokio::time::timeout(Duration::from_millis(100), group.ended()).await.expect_err("it listens");
        same.shutdown(Shutdown::Both).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), group.ended()).await.expect("the end is reported");
        assert_eq!(ended.task, "the listener");
        assert!(ended.why.contains("no longer accepts connections"), "{}", ended.why);
    }
}
