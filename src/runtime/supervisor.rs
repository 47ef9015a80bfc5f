//! Tasks that must not end. A process that goes on without one of them holds its lease and does nothing, or answers from
//! what once was; so when one returns or panics, the process stops, and says which one and why.

use std::{collections::HashMap, fmt, io, time::Duration};

use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, timeout_at},
};

/// A group of tasks, each with a name for people.
#[derive(Debug, Default)]
pub struct Supervisor {
    tasks: JoinSet<String>,
    names: HashMap<Id, &'static str>,
}

/// A task that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its name: "the controller".
    pub task: &'static str,
    /// Why, in words.
    pub why: String,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} has ended, which it must not: {}", self.task, self.why)
    }
}

/// What a task returns.
pub trait Outcome {
    /// Why it ended, in words.
    fn why(self) -> String;
}

impl Outcome for () {
    fn why(self) -> String {
        "it returned".to_owned()
    }
}

impl Outcome for io::Result<()> {
    fn why(self) -> String {
        self.map_or_else(|error| error.to_string(), Outcome::why)
    }
}

impl Supervisor {
    /// Starts a task.
    pub fn spawn<T: Outcome>(&mut self, name: &'static str, task: impl Future<Output = T> + Send + 'static) {
        let task = self.tasks.spawn(async move { task.await.why() });
        self.names.insert(task.id(), name);
    }

    /// Waits until one of them ends. Waits for ever if there is none.
    pub async fn ended(&mut self) -> Ended {
        match self.next().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// Waits until all have ended, for `patience` at most; then cuts off the others. For tasks that were asked to stop.
    pub async fn finish(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while let Ok(ended) = timeout_at(deadline, self.next()).await {
            if ended.is_none() {
                return;
            }
        }
        let late: Vec<_> = self.names.values().copied().collect();
        tracing::warn!(tasks = late.join(", "), "cut off, since they did not stop within {}s", patience.as_secs());
        self.abort().await;
    }

    /// Cuts all of them off, and waits until they are gone.
    pub async fn abort(&mut self) {
        self.tasks.shutdown().await;
        self.names.clear();
    }

    async fn next(&mut self) -> Option<Ended> {
        let (id, why) = match self.tasks.join_next_with_id().await? {
            Ok((id, why)) => (id, why),
            Err(error) => (error.id(), broken(error)),
        };
        Some(Ended { task: self.names.remove(&id).unwrap_or("a task"), why })
    }
}

fn broken(error: JoinError) -> String {
    let Ok(payload) = error.try_into_panic() else { return "it was cut off".to_owned() };
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
    use crate::runtime::listener::{self, Places};

    fn forever(group: &mut Supervisor) {
        group.spawn("another", std::future::pending::<()>());
    }

    #[tokio::test]
    async fn a_task_that_returns_or_panics_is_named_with_its_reason() {
        type Spawn = fn(&mut Supervisor);
        let cases: [(Spawn, &str); 4] = [
            (|group| group.spawn("it", async {}), "it returned"),
            (|group| group.spawn("it", async { Err::<(), _>(io::Error::other("no socket")) }), "no socket"),
            (|group| group.spawn("it", async { panic!("of {}", "fright") as () }), "it panicked: of fright"),
            (|group| group.spawn("it", async { std::panic::panic_any(7) as () }), "it panicked"),
        ];
        for (spawn, why) in cases {
            let mut group = Supervisor::default();
            forever(&mut group);
            spawn(&mut group);
            let ended = tokio::time::timeout(Duration::from_secs(5), group.ended()).await.expect("it is noticed");
            assert_eq!(ended, Ended { task: "it", why: why.to_owned() });
            assert!(ended.to_string().contains("which it must not"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_asked_to_stop_is_waited_for_and_then_cut_off() {
        let mut group = Supervisor::default();
        group.spawn("a quick one", sleep(Duration::from_secs(2)));
        let begin = Instant::now();
        group.finish(Duration::from_secs(10)).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(2));
        group.spawn("a quick one", sleep(Duration::from_secs(2)));
        forever(&mut group);
        group.finish(Duration::from_secs(10)).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(12));
        assert!(group.tasks.is_empty() && group.names.is_empty());
    }

    /// The real listener, on a socket that stops listening.
    #[tokio::test]
    async fn a_listener_whose_socket_is_gone_ends() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        // The system knows one kind of socket, and both names are for the same.
        let same = TcpStream::from(std::os::fd::OwnedFd::from(socket.try_clone().unwrap()));
        let mut group = Supervisor::default();
        let server = listener::serve(socket, None, axum_server::Handle::new(), Places::new(1), Router::<()>::new);
        group.spawn("the listener", server);
        tokio::time::timeout(Duration::from_millis(100), group.ended()).await.expect_err("it listens");
        same.shutdown(Shutdown::Both).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), group.ended()).await.expect("it is noticed");
        assert_eq!(ended.task, "the listener");
        assert!(ended.why.contains("no longer accepts connections"), "{}", ended.why);
    }
}
