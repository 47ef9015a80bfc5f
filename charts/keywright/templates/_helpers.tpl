{{/* The name of the chart, for labels. */}}
{{- define "keywright.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* The prefix of every name. 50 characters, so that the longest suffix still fits a DNS label. */}}
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

{{/* Labels that all pods of the release have, and nothing else's. */}}
{{- define "keywright.podLabels" -}}
app.kubernetes.io/name: {{ include "keywright.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels by which the operator's pods are selected. They can never change. */}}
{{- define "keywright.selectorLabels" -}}
{{ include "keywright.podLabels" . }}
app.kubernetes.io/component: operator
{{- end }}

{{/* Labels by which the verifier's pods are selected. They can never change. */}}
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
{{- required "serviceAccount.name: say which ServiceAccount to use, since serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The operator as the apiserver knows it. */}}
{{- define "keywright.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "keywright.serviceAccountName" . }}
{{- end }}

{{- define "keywright.verifierServiceAccountName" -}}
{{- $name := .Values.verifier.serviceAccount.name }}
{{- if .Values.verifier.serviceAccount.create }}
{{- $name = default (printf "%s-verifier" (include "keywright.fullname" .)) $name }}
{{- end }}
{{- $name = required "verifier.serviceAccount.name: say which ServiceAccount to use, since verifier.serviceAccount.create is false" $name }}
{{- if eq $name (include "keywright.serviceAccountName" .) }}
{{- fail "verifier.serviceAccount.name: choose another than the operator's, which may write Secrets" }}
{{- end }}
{{- $name }}
{{- end }}

{{/* The verifier as the apiserver knows it. */}}
{{- define "keywright.verifierUsername" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "keywright.verifierServiceAccountName" . }}
{{- end }}

{{/*
Not empty if the verifier reports when keys were used. Without the policy that limits it to that, it has no right to write
a status, which could forge keys.
*/}}
{{- define "keywright.reportsLastUse" -}}
{{- if and .Values.verifier.enabled .Values.admissionPolicies.enabled (regexMatch "[1-9]" .Values.verifier.lastUsed.interval) }}yes{{ end }}
{{- end }}

{{/* Not empty if the operator issues the verifier's certificate. */}}
{{- define "keywright.issuesForVerifier" -}}
{{- if and .Values.verifier.enabled .Values.verifier.tls.enabled (not .Values.certManager.enabled) }}yes{{ end }}
{{- end }}

{{/* The ConfigMaps that may hold exported digests, as many as the operator writes at most. */}}
{{- define "keywright.exportMaps" -}}
{{- $maps := list .Values.export.name }}
{{- range untilStep 2 33 1 }}
{{- $maps = append $maps (printf "%s-%d" $.Values.export.name .) }}
{{- end }}
{{- toJson $maps }}
{{- end }}

{{/* What each pod has in common: who it is inside, and where the image comes from. */}}
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

{{/* What each container has in common. */}}
{{- define "keywright.container" -}}
# Two minutes to start, for a cluster with very many keys.
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

{{/* Where pods run. Call with a dict of values, that have the usual four names, and selector, the labels of the pods. */}}
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
  # On different nodes if there are any; a cluster of one node still gets both.
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- .selector | nindent 8 }}
    # Count the pods of this revision alone, or a rollout leaves both new ones on one node.
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
A file of the chart as an object with the chart's labels, and kept on uninstall if asked. Call with a dict of root, file
and keep.
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
Garbage collection and the namespace controller touch any object, and must not be held up. Nobody can be one of them but
those who run the control plane.
*/}}
{{- define "keywright.notAController" -}}
- name: not-garbage-collection
  expression: >-
    !(request.userInfo.username in ['system:serviceaccount:kube-system:generic-garbage-collector',
    'system:serviceaccount:kube-system:namespace-controller', 'system:kube-controller-manager'])
{{- end }}

{{/*
A validation for every object that Keywright reads. The API server takes times in managedFields from an update as they are,
also such as 9999-12-31T23:59:59-14:00, which it then stores as a time of the year 10000. Clients that can't represent such
a time can't read the object, and with it no list that has it. Times that were there before are left to the one who wrote
them, so that the object can still be changed.
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
Who may connect to the health port: what reads the metrics. The kubelet, which probes, needs no rule, since Kubernetes
always allows connections from the node of a pod.
*/}}
{{- define "keywright.metricsIngress" -}}
{{- if or .Values.networkPolicy.metricsFrom .Values.metrics.podMonitor.enabled .Values.metrics.serviceMonitor.enabled -}}
# What reads the metrics.
- ports:
    - port: health
  from:
    {{- toYaml (default (list (dict "namespaceSelector" dict)) .Values.networkPolicy.metricsFrom) | nindent 4 }}
{{- end }}
{{- end }}

{{/* What pods connect to. */}}
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
# DNS, of which clusters have different kinds: pods, a cache on each node, a server outside.
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end }}
