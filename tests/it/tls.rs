//! TLS: whom the store believes, and what it refuses.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checkpoint_store::postgres::{NoTls, Socket};
use checkpoint_store::r2d2_postgres::PostgresConnectionManager;
use checkpoint_store::{
    CheckpointStore, Error, PostgresCheckpointStore, conformance, postgres::tls::MakeTlsConnect,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::harness::{self, Options, Server, chain, give_away, sql_state};

/// Whom the server's certificate is made out to. The address is given besides, so nobody is asked
/// for this name.
const NAME: &str = "db.example";

/// Somebody who signs certificates.
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A server that shows a certificate of this authority, and takes no connection without TLS.
    fn server(&self, password: Option<&str>) -> Server {
        let how = if password.is_some() { "scram-sha-256" } else { "trust" };
        let server = Server::prepare(Options {
            hba: Some(format!("hostssl all all 127.0.0.1/32 {how}\n")),
            password: password.map(ToOwned::to_owned),
            ..Options::fast().set("ssl", "on")
        });
        server.init();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([NAME.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        for (file, text) in [("server.crt", certificate.pem()), ("server.key", key.serialize_pem())]
        {
            let file = server.data().join(file);
            fs::write(&file, text).unwrap();
            give_away(&file);
        }
        server.restart();
        server
    }

    /// A client that believes this authority, and no other.
    fn connector(&self) -> MakeRustlsConnect {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        MakeRustlsConnect::new(
            ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth(),
        )
    }
}

fn params(server: &Server, name: &str) -> String {
    format!("host={name} hostaddr=127.0.0.1 port={} user=postgres", server.port())
}

fn connect(
    params: &str,
    connector: MakeRustlsConnect,
) -> checkpoint_store::Result<PostgresCheckpointStore> {
    PostgresCheckpointStore::builder().connect_tls(params, connector)
}

/// Asserts that it is refused at once and for good, and returns all that is said about it.
fn refusal<T>(params: &str, connector: T) -> (Error, String)
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as checkpoint_store::postgres::tls::TlsConnect<Socket>>::Future: Send,
{
    let started = Instant::now();
    let refused = PostgresCheckpointStore::builder().connect_tls(params, connector);
    let error = refused.map(drop).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(!error.is_transient(), "{error:?}");
    let told = chain(&error);
    assert!(told.contains("connect: server "), "{told}");
    (error, told)
}

#[test]
fn a_server_that_shows_the_right_certificate_is_believed() {
    let authority = Authority::new();
    let server = authority.server(None);
    let params = params(&server, NAME);
    let store = connect(&params, authority.connector()).unwrap();
    store.migrate().unwrap();
    conformance::verify(&store);
    let params = format!("{params} sslmode=require");
    let store = connect(&params, authority.connector()).unwrap();
    let mut client = store.connection().unwrap();
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert!(client.query_one(sql, &[]).unwrap().get::<_, bool>(0));
    let mut tx = client.transaction().unwrap();
    assert_eq!(store.in_transaction(&mut tx).lock("orders").unwrap(), 0);
}

#[test]
fn a_password_is_bound_to_the_channel() {
    let authority = Authority::new();
    let server = authority.server(Some("hunter2"));
    let params = format!("{} channel_binding=require password=", params(&server, NAME));
    let store = connect(&format!("{params}hunter2"), authority.connector()).unwrap();
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    let (error, _) = refusal(&format!("{params}wrong"), authority.connector());
    assert_eq!(sql_state(&error).as_deref(), Some("28P01"));
}

#[test]
fn a_certificate_of_another_authority_is_refused() {
    let server = Authority::new().server(None);
    for sslmode in ["", " sslmode=require"] {
        let params = format!("{}{sslmode}", params(&server, NAME));
        let (_, told) = refusal(&params, Authority::new().connector());
        assert!(told.contains("invalid peer certificate"), "{told}");
    }
}

#[test]
fn a_certificate_for_another_name_is_refused() {
    let authority = Authority::new();
    let server = authority.server(None);
    let (_, told) = refusal(&params(&server, "other.example"), authority.connector());
    assert!(told.contains("invalid peer certificate"), "{told}");
    assert!(told.contains("other.example"), "{told}");
    let (_, told) = refusal(&params(&server, "127.0.0.1"), authority.connector());
    assert!(told.contains("invalid peer certificate"), "{told}");
}

#[test]
fn a_server_that_wants_tls_refuses_plain_text() {
    let server = Authority::new().server(None);
    let (error, told) = refusal(&params(&server, NAME), NoTls);
    assert_eq!(sql_state(&error).as_deref(), Some("28000"));
    assert!(told.contains("no encryption"), "{told}");
}

#[test]
fn plain_text_is_refused_where_the_parameters_want_tls() {
    let authority = Authority::new();
    let server = authority.server(None);
    let (_, told) = refusal(&format!("{} sslmode=require", params(&server, NAME)), NoTls);
    assert!(told.contains("TLS"), "{told}");
    // A server that has none to offer.
    let params = format!("{} sslmode=require", params(harness::server(), NAME));
    let (_, told) = refusal(&params, authority.connector());
    assert!(told.contains("TLS"), "{told}");
}

#[test]
fn a_certificate_that_changes_is_refused_for_every_further_connection() {
    let authority = Authority::new();
    let server = authority.server(None);
    let manager = PostgresConnectionManager::new(
        params(&server, NAME).parse().unwrap(),
        authority.connector(),
    );
    let pool = checkpoint_store::r2d2::Pool::builder()
        .max_size(1)
        .connection_timeout(Duration::from_secs(5))
        .test_on_check_out(false)
        .build(manager)
        .unwrap();
    let store = PostgresCheckpointStore::new(pool);
    store.migrate().unwrap();
    store.save("orders", 1).unwrap();
    server.stop();
    let impostor = Authority::new().server(None);
    for file in ["server.crt", "server.key"] {
        fs::copy(impostor.data().join(file), server.data().join(file)).unwrap();
    }
    server.restart();
    let error = store.save("orders", 2).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(chain(&error).contains("TLS handshake"), "{}", chain(&error));
}
