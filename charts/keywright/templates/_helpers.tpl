{{/* The name of the chart, for labels. */}}
{{- define "keywright.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* The prefix of every name: at most 50 characters, so that a name with the longest suffix is a DNS label. */}}
{{- define "keywright.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels that all pods of the release have and no other pods. */}}
{{- define "keywright.podLabels" -}}
app.kubernetes.io/name: {{ include "keywright.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The labels that select the operator's pods. A selector is immutable, so they never change. */}}
{{- define "keywright.selectorLabels" -}}
{{ include "keywright.podLabels" . }}
app.kubernetes.io/component: operator
{{- end }}

{{/* The labels that select the verifier's pods. A selector is immutable, so they never change. */}}
{{- define "keywright.verifierSelectorLabels" -}}
{{ include "keywright.podLabels" . }}
app.kubernetes.io/component: verifier
{{- end }}

{{/* Labels of every object. */}}
{{- define "keywright.labels" -}}
app.kubernetes.io/name: {{ include "keywright.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: keywright
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "keywright.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "keywright.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: Required value: serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The username of the operator at the API server. */}}
{{- define "keywright.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "keywright.serviceAccountName" . }}
{{- end }}

{{- define "keywright.verifierServiceAccountName" -}}
{{- $name := .Values.verifier.serviceAccount.name }}
{{- if .Values.verifier.serviceAccount.create }}
{{- $name = default (printf "%s-verifier" (include "keywright.fullname" .)) $name }}
{{- end }}
{{- $name = required "verifier.serviceAccount.name: Required value: verifier.serviceAccount.create is false" $name }}
{{- if eq $name (include "keywright.serviceAccountName" .) }}
{{- fail "verifier.serviceAccount.name: Invalid value: must not be the operator's ServiceAccount, which may write Secrets" }}
{{- end }}
{{- $name }}
{{- end }}

{{/* The username of the verifier at the API server. */}}
{{- define "keywright.verifierUsername" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "keywright.verifierServiceAccountName" . }}
{{- end }}

{{/*
Not empty if the verifier reports when keys were used. Without the policy that restricts it to status.lastUsedAt, it has
no right to write a status, since that right would allow it to forge keys.
*/}}
{{- define "keywright.reportsLastUse" -}}
{{- if and .Values.verifier.enabled .Values.admissionPolicies.enabled (regexMatch "[1-9]" .Values.verifier.lastUsed.interval) }}yes{{ end }}
{{- end }}

{{/* Not empty if the operator issues the verifier's certificate. */}}
{{- define "keywright.issuesForVerifier" -}}
{{- if and .Values.verifier.enabled .Values.verifier.tls.enabled (not .Values.certManager.enabled) }}yes{{ end }}
{{- end }}

{{/* The names of the ConfigMaps with exported digests: the operator writes at most 32. */}}
{{- define "keywright.exportMaps" -}}
{{- $maps := list .Values.export.name }}
{{- range untilStep 2 33 1 }}
{{- $maps = append $maps (printf "%s-%d" $.Values.export.name .) }}
{{- end }}
{{- toJson $maps }}
{{- end }}

{{/* Common to all pods: the user and the pull secrets. */}}
{{- define "keywright.pod" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* Common to all containers: probes and security context. */}}
{{- define "keywright.container" -}}
# Two minutes, for a cluster with very many keys.
startupProbe:
  httpGet:
    path: /healthz
    port: health
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet:
    path: /healthz
    port: health
  periodSeconds: 10
  timeoutSeconds: 3
  failureThreshold: 3
readinessProbe:
  httpGet:
    path: /readyz
    port: health
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/*
The scheduling of pods. Call with a dict of values (with nodeSelector, tolerations, affinity, topologySpreadConstraints)
and selector, the labels of the pods.
*/}}
{{- define "keywright.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if .values.topologySpreadConstraints }}
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  # Prefer different nodes. ScheduleAnyway allows two pods on the only node of a cluster.
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- .selector | nindent 8 }}
    # Only pods of the same revision count. Otherwise a rollout could leave both new pods on one node.
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{- define "keywright.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag }}
{{- if .Values.image.digest }}
{{- printf "%s:%s@%s" .Values.image.repository $tag .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}
{{- end }}

{{/*
A file of the chart as an object with the chart's labels. With keep, Helm leaves it in the cluster on uninstall. Call
with a dict of root, file and keep.
*/}}
{{- define "keywright.object" -}}
{{- $object := .root.Files.Get .file | fromYaml }}
{{- if not (hasKey $object "kind") }}
{{- fail (printf "%s: %s" .file (default "not a Kubernetes object" (get $object "Error"))) }}
{{- end }}
{{- $metadata := dict "labels" (include "keywright.labels" .root | fromYaml) }}
{{- if .keep }}
{{- $_ := set $metadata "annotations" (dict "helm.sh/resource-policy" "keep") }}
{{- end }}
{{- merge $object (dict "metadata" $metadata) | toYaml }}
{{- end }}

{{/*
The garbage collector and the namespace controller change and delete objects of every kind and must not be blocked. Only
administrators of the control plane can act as one of these users.
*/}}
{{- define "keywright.notAController" -}}
- name: not-garbage-collection
  expression: >-
    !(request.userInfo.username in ['system:serviceaccount:kube-system:generic-garbage-collector',
    'system:serviceaccount:kube-system:namespace-controller', 'system:kube-controller-manager'])
{{- end }}

{{/*
A validation for every object that Keywright reads. The API server accepts any time in managedFields of an update, such
as 9999-12-31T23:59:59-14:00, and stores it as a time of the year 10000. Clients that can't represent this time can't
read the object or any list that contains it. Times that the stored object already has are accepted, so that the
object can still be changed.
*/}}
{{- define "keywright.readableTimes" -}}
- expression: >-
    !has(object.metadata.managedFields) || object.metadata.managedFields.all(entry, !has(entry.time) ||
    string(entry.time).matches('^(19[7-9][0-9]|[2-8][0-9]{3})-') ||
    request.operation == 'UPDATE' && has(oldObject.metadata.managedFields) &&
    oldObject.metadata.managedFields.exists(old, has(old.time) && old.time == entry.time))
  reason: Invalid
  message: "metadata.managedFields: Invalid value: the time of each entry must be between the years 1970 and 8999"
{{- end }}

{{/*
The ingress rule of the health port, for clients of the metrics. The probes of the kubelet need no rule: Kubernetes
always allows connections from the node of a pod.
*/}}
{{- define "keywright.metricsIngress" -}}
{{- if or .Values.networkPolicy.metricsFrom .Values.metrics.podMonitor.enabled .Values.metrics.serviceMonitor.enabled -}}
# Clients of the metrics.
- ports:
    - port: health
  from:
    {{- toYaml (default (list (dict "namespaceSelector" dict)) .Values.networkPolicy.metricsFrom) | nindent 4 }}
{{- end }}
{{- end }}

{{/* The egress rules of all pods. */}}
{{- define "keywright.egress" -}}
# The API server.
- ports:
    {{- range .Values.networkPolicy.apiServerPorts }}
    - port: {{ . }}
    {{- end }}
  {{- with .Values.networkPolicy.apiServer }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# DNS, at any address: a cluster may use pods, a cache on each node or a server outside the cluster.
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- with .Values.traces.otlpEndpoint }}
# The receiver of spans.
- ports:
    - port: {{ regexFind "[0-9]+$" . }}
{{- end }}
{{- end }}

{{/* The environment of the export of spans. */}}
{{- define "keywright.tracesEnv" -}}
{{- if .Values.traces.otlpEndpoint }}
- name: OTEL_TRACES_SAMPLER
  value: {{ .Values.traces.sampler }}
{{- with .Values.traces.samplerArg }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}
